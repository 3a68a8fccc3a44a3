"""The `windlass` command. A verb's code, and torch with it, is imported only when the verb is used."""

from __future__ import annotations

if __name__ == "__main__":
    import windlass.safe_path  # before all else

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import windlass
from windlass import process, streams
from windlass.errors import EXIT_DONE, EXIT_FAILURE, EXIT_USER_ERROR, WindlassError
from windlass.exchange import cli as exchange_cli
from windlass.exchange import generate_cli
from windlass.launch import script_cli
from windlass.plan import cli as plan_cli
from windlass.text import printable

TRAIN_HELP = "train a model (KEY=VALUE overrides; `windlass train --help` prints every key)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 the user's mistake, 75 stopped on request, 1 the rest."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    streams.make_lasting()
    try:
        if arguments[:1] == ["train"]:  # Hydra reads the rest
            from windlass.launch.main import train

            return train(arguments[1:])
        options = _parser(arguments).parse_args(arguments)
        code = options.run(options)
        sys.stdout.flush()
        if (reason := streams.why_lost(sys.stdout)) is None:
            return code
        # What such a command prints is all that it does. (A reader of a pipe that leaves knows that it does.)
        print(f"windlass: error: the output could not be written: {reason}", file=sys.stderr)
        return EXIT_FAILURE
    except WindlassError as error:
        print(f"windlass: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("windlass: interrupted", file=sys.stderr)
        return EXIT_FAILURE


def command() -> NoReturn:
    """The `windlass` command as a process of its own: `main`, and what is to begin before and end after it."""
    process.run(main)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="windlass",
        description="Trains models too big for the machine at hand, and loses nothing when a process or a disk dies.",
        epilog="Exit codes: 0 done, 2 your input is at fault, 75 stopped on request (the same command resumes), "
        "1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"windlass {windlass.__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verbs.add_parser("train", help=TRAIN_HELP, add_help=False)
    plan_cli.add_parser(verbs).set_defaults(run=_plan)
    script_cli.add_parser(verbs)
    _add_report(verbs)
    _add_doctor(verbs)
    _add_checkpoint(verbs)
    _add_data(verbs, arguments)
    generate_cli.add_parser(verbs)
    return parser


def _plan(options: argparse.Namespace) -> int:
    from windlass.conf.compose import compose

    return plan_cli.run(options, compose(options.overrides))


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = verbs.add_parser("report", help="write report.html, with plots, into a run's folder")
    report.add_argument("run_dir", type=Path, help="the folder of a run")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from windlass.observe.report import write_report

    print(printable(str(write_report(options.run_dir))))
    return EXIT_DONE


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    doctor = verbs.add_parser("doctor", help="check this machine: torch, backends, memory, disk")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--measure", action="store_true", help="measure again how fast this machine is, for plans")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from windlass.plan.doctor import diagnose, render

    checks = diagnose(measure=options.measure)
    print(render(checks, as_json=options.json))
    return EXIT_FAILURE if any(check.status == "fail" for check in checks) else EXIT_DONE


def _add_checkpoint(verbs: argparse._SubParsersAction) -> None:
    checkpoint = verbs.add_parser("ckpt", help="list, verify, export or import checkpoints; list snapshot agents")
    actions = checkpoint.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, text in (
        ("list", "list the checkpoints of a run"),
        ("verify", "read every byte of a checkpoint again and compare checksums"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("path", help="a run's folder, its checkpoints/ folder, one checkpoint, or the URL of one")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=_checkpoint, action=name)
    text = "list the snapshot agents of yours on this node"
    agents = actions.add_parser("agents", help=text, description=text)
    agents.add_argument("--json", action="store_true", help="print JSON")
    agents.add_argument("--shm-dir", type=Path, help="the job's checkpoint.shm_dir, where it has set one")
    agents.set_defaults(run=_agents)
    exchange_cli.add_parsers(actions)


def _checkpoint(options: argparse.Namespace) -> int:
    from windlass.checkpoint import inspect

    if options.action == "list":
        print(inspect.render_list(inspect.list_checkpoints(options.path), as_json=options.json))
        return EXIT_DONE
    results = inspect.verify(options.path)
    print(inspect.render_verification(results, as_json=options.json))
    return EXIT_DONE if all(result.is_sound for result in results) else EXIT_FAILURE


def _agents(options: argparse.Namespace) -> int:
    from windlass.checkpoint.agent.listing import list_agents, render_agents

    print(render_agents(list_agents(options.shm_dir), as_json=options.json))
    return EXIT_DONE


def _add_data(verbs: argparse._SubParsersAction, arguments: Sequence[str]) -> None:
    data = verbs.add_parser("data", help="prepare text and conversations for training, and show them")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    if arguments[:1] == ["data"]:  # pyarrow takes a while to import
        from windlass.data import cli as data_cli
        from windlass.data import show

        data_cli.add_parser(actions)
        actions.choices["prepare"].set_defaults(run=data_cli.run)
        show.add_parser(actions).set_defaults(run=show.run)


if __name__ == "__main__":
    command()
