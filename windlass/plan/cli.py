"""`windlass plan`: its arguments, and what it prints. Torch-free until it runs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.errors import EXIT_DONE, require

if TYPE_CHECKING:
    from windlass.conf.schema import Config
    from windlass.plan.fixes import Fix
    from windlass.plan.forecast import Plan

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(verbs: SubParsers) -> argparse.ArgumentParser:
    """Adds the verb `plan`. `run` does what it parses."""
    text = "forecast memory, time and disk of a run, and whether it fits"
    parser = verbs.add_parser("plan", help=text, description=f"{text.capitalize()}. Allocates nothing.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for `windlass train`")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: as launch= says)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace, config: Config) -> int:
    """Prints the plan of `config`."""
    from windlass.data.prepare import vocab_size_of
    from windlass.machine.speeds import existing_folder, load_machine, save_machine
    from windlass.plan.fixes import cheapest_fix
    from windlass.plan.forecast import forecast
    from windlass.plan.measure import measure_machine
    from windlass.train.build import resolve_vocabulary

    if config.model.vocab_size is None:
        resolve_vocabulary(config, vocab_size_of(config.data))
    num_ranks = _num_ranks(options, config)
    machine = load_machine()
    measure_machine(
        machine,
        num_ranks,
        config.train.dtype,
        existing_folder(config.offload.folder(Path(config.run_dir)) or Path(config.run_dir)),
    )
    plan = forecast(config, num_ranks, machine)
    fix = None if plan.fits else cheapest_fix(config, num_ranks, machine)
    save_machine(machine)
    if options.json:
        document = asdict(plan) | {"is_close": plan.is_close, "fix": None if fix is None else asdict(fix)}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(render(plan, fix) + "\n")
    return EXIT_DONE


def _num_ranks(options: argparse.Namespace, config: Config) -> int:
    if options.ranks is not None:
        require(options.ranks >= 1, "--ranks", options.ranks, "must be at least 1", "leave it out")
        return options.ranks
    return config.launch.nproc_per_node or 1


def render(plan: Plan, fix: Fix | None) -> str:
    """The plan as text.

    Args:
        fix: what makes it fit, where it does not.
    """
    from windlass.observe.console import size

    memory, time = plan.memory, plan.time
    verdict = "fits" if plan.fits else "may not fit: it is close" if plan.is_close else "DOES NOT FIT"
    rows = [
        ("weights and optimizer state", memory.persistent.host),
        ("gradients and activations", memory.activations),
        ("buffers for the disk", memory.buffers),
        ("allocator", memory.allocator),
        ("process", memory.process),
    ]
    lines = [
        f"{plan.num_parameters:,} parameters, {plan.num_ranks} rank{'s' * (plan.num_ranks > 1)}: {verdict}",
        "",
        "memory of a rank at its peak",
        *(f"  {name:<27} {size(num_bytes):>10}" for name, num_bytes in rows),
        f"  {'peak':<27} {size(memory.peak.expected):>10}  ({size(memory.peak.low)} to {size(memory.peak.high)})",
        "",
        "kept between steps",
        f"  {'weights':<27} {size(memory.weights):>10}",
        f"  {'optimizer state':<27} {size(memory.optimizer):>10}",
        f"  {'of these in memory':<27} {size(memory.persistent.host):>10}",
        f"  {'of these on the disk':<27} {size(memory.persistent.ssd):>10}  ({size(memory.peak_tiers.ssd)} at most)",
        "",
        "a step",
        f"  {'time':<27} {time.step.expected:>8.3f} s  ({time.step.low:.3f} to {time.step.high:.3f})",
        f"  {'  kernels':<27} {time.kernels_s:>8.3f} s",
        f"  {'  calling them':<27} {time.overhead_s:>8.3f} s",
        f"  {'  communication':<27} {time.comm_s:>8.3f} s  {size(plan.comm_bytes)}",
        f"  {'  waiting for the disk':<27} {time.stall_s:>8.3f} s  of {time.disk_s:.3f} s that it works",
        f"  {'  moving and checking bytes':<27} {time.disk_cpu_s:>8.3f} s",
        f"  {'  fresh memory':<27} {time.pages_s:>8.3f} s",
        f"  {'tokens a second':<27} {plan.tokens_per_s:>8,.0f}    (bound by {plan.bottleneck})",
        f"  {'SSD read, written':<27} {size(plan.ssd_read_bytes):>10}, {size(plan.ssd_write_bytes)}"
        f"  ({plan.ssd_written_tb_per_day:.2f} TB a day)",
        *_break_even(plan),
        "",
        *plan.reasons,
    ]
    if fix is not None:
        lines.append(f"cheapest way to make it fit: {' '.join(fix.overrides)}")
        lines.append(f"  with that {size(fix.peak_bytes)} a rank and {fix.step_s:.3f} s a step")
        if not fix.keeps_result:
            lines.append("  this changes what training comes to: nothing that keeps it fits")
    elif not plan.fits:
        lines.append("nothing that windlass could change makes it fit: choose a smaller model, or a larger machine")
    return "\n".join(lines)


def _break_even(plan: Plan) -> list[str]:
    if plan.break_even_tokens is None:
        return []
    return [f"  {'break-even':<27} {plan.break_even_tokens:>8,} tokens a step: from there on computing hides the disk"]
