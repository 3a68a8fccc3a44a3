"""`windlass generate`: its arguments. Torch-free until it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

MAX_NEW_TOKENS = 256


def add_parser(verbs: SubParsers) -> None:
    """Adds `generate` to the verbs."""
    parser = verbs.add_parser(
        "generate",
        help="let a run, a checkpoint or a Hugging Face folder answer a prompt",
        description="Writes what a model makes of a prompt to stdout, token by token. The prompt is rendered with the"
        " chat template where the tokenizer has one, else it is completed. The likeliest token is taken each time,"
        " unless --temperature is given. It ends with the model's end of turn.",
    )
    parser.add_argument(
        "path", help="a run's folder (the newest checkpoint), a checkpoint, the URL of one, or a Hugging Face folder"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to answer or complete; - reads stdin")
    parser.add_argument("--system", metavar="TEXT", help="the system's turn before it, where the template knows one")
    parser.add_argument("--no-template", action="store_true", help="complete the prompt as it is")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="at most (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="choose at random, the flatter the higher")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest of so much probability")
    parser.add_argument("--seed", type=int, metavar="N", help="of the choice: the same again")
    parser.add_argument("--step", type=int, metavar="N", help="the run's checkpoint of this step (default: the newest)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from windlass.exchange import generate

    return generate.run(options)
