"""Reads the arguments of `windlass script`, and prints what it writes. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from windlass.errors import EXIT_DONE

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

GRACE_S = 300
DESCRIPTION = "runs `windlass train launch=torchrun` on every node, saves when it is told to end, and goes on later"


def add_parser(verbs: SubParsers) -> None:
    """Adds the verb `script`."""
    text = "print a script that trains on several nodes of a batch system"
    description = f"{text.capitalize()}. What it will run is checked, and nothing is submitted."
    script = verbs.add_parser("script", help=text, description=description)
    systems = script.add_subparsers(title="batch systems", metavar="SYSTEM", required=True)
    _add_slurm(systems)
    _add_kubernetes(systems)


def _add_slurm(systems: SubParsers) -> None:
    parser = systems.add_parser(
        "slurm", help="a batch script for sbatch", description=f"Prints a batch script for sbatch, which {DESCRIPTION}."
    )
    _add_shared(parser, "of a node, as sbatch takes it, e.g. 64G")
    parser.add_argument("--time", metavar="LIMIT", help="time limit, as sbatch takes it, e.g. 12:00:00")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a line of shell before windlass starts, e.g. 'source env/bin/activate'; may be repeated",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option for sbatch, e.g. --sbatch=--constraint=ib; may be repeated",
    )
    parser.set_defaults(run=run_slurm)


def _add_kubernetes(systems: SubParsers) -> None:
    parser = systems.add_parser(
        "kubernetes",
        help="a manifest for kubectl",
        description=f"Prints a manifest for kubectl: a Job that {DESCRIPTION}, and its Service.",
    )
    _add_shared(parser, "of a pod, e.g. 64Gi, its shared memory included")
    parser.add_argument("--image", required=True, help="the container image, which has windlass")
    parser.add_argument(
        "--claim", required=True, metavar="NAME", help="the PersistentVolumeClaim that all pods write run folders to"
    )
    parser.add_argument("--storage", metavar="SIZE", help="have the claim made, of this size, e.g. 500Gi")
    parser.add_argument("--storage-class", metavar="NAME", help="of the claim that is made (default: the cluster's)")
    parser.add_argument("--mount", default="/runs", metavar="PATH", help="where pods have that volume (/runs)")
    parser.add_argument("--shm", default="8Gi", metavar="SIZE", help="of /dev/shm, for snapshots in memory (8Gi)")
    parser.add_argument("--namespace", metavar="NAME")
    parser.add_argument(
        "--retries", type=int, default=3, metavar="N", help="how often a job that failed is started again (3)"
    )
    parser.set_defaults(run=run_kubernetes)


def _add_shared(parser: argparse.ArgumentParser, memory_help: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `windlass train`")
    parser.add_argument(
        "--nodes", default="1", metavar="N|MIN:MAX", help="how many; MIN:MAX goes on with fewer when nodes are lost (1)"
    )
    parser.add_argument("--name", default="windlass", help="of the job (windlass)")
    parser.add_argument("--gpus", type=int, metavar="N", help="of a node; a rank is started on each")
    parser.add_argument("--cpus", type=int, metavar="N", help="cores of a node")
    parser.add_argument("--memory", metavar="SIZE", help=memory_help)
    parser.add_argument(
        "--grace-s", type=int, default=GRACE_S, metavar="S", help=f"seconds in which a job can save ({GRACE_S})"
    )


def run_slurm(options: argparse.Namespace) -> int:
    """Prints the script. Raises ConfigError."""
    from windlass.launch.script import parse_job, parse_options
    from windlass.launch.script_slurm import SlurmOptions, slurm_script

    own = parse_options(SlurmOptions, options)
    sys.stdout.write(slurm_script(parse_job(options)[0], own))
    return EXIT_DONE


def run_kubernetes(options: argparse.Namespace) -> int:
    """Prints the manifest. Raises ConfigError."""
    from windlass.launch.script import parse_job, parse_options
    from windlass.launch.script_kubernetes import KubernetesOptions, kubernetes_manifest

    own = parse_options(KubernetesOptions, options)
    job, config = parse_job(options)
    sys.stdout.write(kubernetes_manifest(job, own, config))
    return EXIT_DONE
