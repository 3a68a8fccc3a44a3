"""The loss of the next token in chunks, beside that of whole logits and torch's own in chunks.

    python benchmarks/long_vocabulary.py [--rounds 3] [--dtypes float32 bfloat16] [--counted 1.0]

Forward and backward of the loss alone, of hidden states and a float32 weight; in each round everything takes its turn,
in a process of its own. Seconds are the processor's, as other programs may have it in between. Memory is the most that
the process held in the step (VmHWM, reset before it) less what it held before: gradients are in it. `--counted` is the
share of tokens whose label counts.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Spread, describe_machine, peak_memory_of, print_table
from torch import Tensor

from windlass.data.batch import IGNORE_INDEX
from windlass.models.spec import Head
from windlass.train.objectives.cross_entropy import cross_entropy_sum

WHOLE, OURS, TORCH = "whole logits", "in chunks", "torch, in chunks"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Result = tuple[float, int, list[Tensor]]
"""Seconds, bytes, the gradients of hidden states and weight where they are asked for."""


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy_sum(hidden, Head(weight), labels)


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    cast = weight.to(hidden.dtype)
    return F.linear_cross_entropy(hidden, cast, labels, ignore_index=IGNORE_INDEX, reduction="sum", options=options)


LOSSES: dict[str, Loss] = {WHOLE: whole, OURS: ours, TORCH: torchs}


def measure(name: str, dtype: str, args: argparse.Namespace, keep_gradients: bool) -> Result:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    hidden = torch.randn(args.tokens, args.width).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.empty(args.vocabulary, args.width).normal_(std=0.02).requires_grad_()
    labels = torch.randint(0, args.vocabulary, (args.tokens,))
    labels[torch.rand(args.tokens) >= args.counted] = IGNORE_INDEX

    (LOSSES[name](hidden[:8], weight[:64], labels[:8] % 64)).backward()  # torch gets ready
    hidden.grad = weight.grad = None

    def step() -> None:
        (LOSSES[name](hidden, weight, labels) / args.tokens).backward()

    begin = time.process_time()
    _, num_bytes = peak_memory_of(step)
    seconds = time.process_time() - begin
    gradients = [tensor.grad.float() for tensor in (hidden, weight) if tensor.grad is not None]
    assert len(gradients) == 2
    return seconds, num_bytes, gradients if keep_gradients else []


def alone(run: Callable[..., Result], *args: object) -> Result:
    """In a process of its own, whose heap nothing has cut up."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=1 << 17)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--counted", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"{describe_machine()}, {args.threads} threads")
    print(f"{args.tokens} tokens ({args.counted:.0%} count), vocabulary {args.vocabulary}, width {args.width}")
    for dtype in args.dtypes:
        found: dict[str, list[Result]] = {name: [] for name in args.losses}
        for number in range(args.rounds):
            for name in args.losses:
                found[name].append(alone(measure, name, dtype, args, number == 0))
        rows = []
        for name, results in found.items():
            seconds = Spread.of([result[0] for result in results])
            peaks = Spread.of([result[1] / 2**20 for result in results])
            base = found[WHOLE]
            slower = Spread.of([result[0] / other[0] for result, other in zip(results, base, strict=True)])
            larger = Spread.of([result[1] / other[1] for result, other in zip(results, base, strict=True)])
            errors = [
                float((mine - theirs).norm() / theirs.norm())
                for mine, theirs in zip(results[0][2], base[0][2], strict=True)
            ]
            rows.append(
                [name, seconds.text(".2f"), slower.text(".2f"), peaks.text(".0f"), larger.text(".3f")]
                + [f"{error:.1e}" for error in errors]
            )
        print(f"\n{dtype}")
        header = ["loss", "seconds", "to whole", "peak MiB", "to whole", "hidden's gradient off by", "weight's"]
        print_table(header, rows)


if __name__ == "__main__":
    main()
