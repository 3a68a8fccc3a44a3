"""The attention of packed documents, beside a dense mask's.

    python benchmarks/packed_attention.py [--rounds 5] [--tokens 8192] [--documents 64] [--window 512]

Forward and backward of one layer's attention; in each round everything takes its turn, in a process of its own. Seconds
are the processor's, as other programs may have it in between. Memory
is the most that the process held in the step (VmHWM, reset before it) less what it held before and less what any
attention makes: its output and the gradients of queries, keys and values. Of the mask it counts all; of the documents,
too. The window is attended to without borders.
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

from windlass.models.attention import Documents, attention

Result = tuple[float, int, list[Tensor]]
"""Seconds, bytes, the output and the gradients."""


def dense(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, window: int | None) -> Tensor:
    mask = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    options = {"attn_mask": mask, "enable_gqa": True}
    return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def within(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, window: int | None) -> Tensor:
    return attention(query, key, value, Documents.of(ids), window=window)


def measure(is_dense: bool, windowed: bool, dtype: str, args: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    query, key, value = (
        torch.randn(1, args.tokens, heads, args.head_dim).to(getattr(torch, dtype)).transpose(1, 2).requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    borders = torch.zeros(1, args.tokens, dtype=torch.int64)
    if not windowed:
        borders[0, 1 + torch.randperm(args.tokens - 1)[: args.documents - 1]] = 1
    ids, window, run = borders.cumsum(1), args.window if windowed else None, dense if is_dense else within
    run(query[:, :, :8], key[:, :, :8], value[:, :, :8], ids[:, :8], None).sum().backward()  # torch gets ready
    for x in (query, key, value):
        x.grad = None
    weights = torch.randn(1, args.tokens, args.heads, args.head_dim).to(query.dtype)

    def step() -> Tensor:
        output = run(query, key, value, ids, window)
        torch.autograd.backward(output, weights)
        return output.detach()

    begin = time.process_time()
    output, num_bytes = peak_memory_of(step)
    seconds = time.process_time() - begin
    found = [output, *(x.grad for x in (query, key, value) if x.grad is not None)]
    assert len(found) == 4
    return seconds, num_bytes - sum(x.nbytes for x in found), [x.float() for x in found]


def alone(run: Callable[..., Result], *args: object) -> Result:
    """In a process of its own, whose heap nothing has cut up."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--only", choices=("documents", "window"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"{describe_machine()}, {args.threads} threads")
    print(f"{args.tokens} tokens, {args.heads} heads of {args.head_dim}, {args.kv_heads} of keys")
    rows = []
    for dtype in args.dtypes:
        for windowed in (False, True):
            name = f"window of {args.window}" if windowed else f"{args.documents} documents"
            if args.only is not None and windowed != (args.only == "window"):
                continue
            pairs = [
                [alone(measure, is_dense, windowed, dtype, args) for is_dense in (True, False)]
                for _ in range(args.rounds)
            ]
            error = max(float((a - b).norm() / a.norm()) for a, b in zip(pairs[0][0][2], pairs[0][1][2], strict=True))
            old, new = ([pair[place] for pair in pairs] for place in (0, 1))
            rows.append(
                [
                    f"{name}, {dtype}",
                    *(Spread.of([result[0] for result in results]).text(".3f") for results in (old, new)),
                    Spread.of([b[0] / a[0] for a, b in pairs]).text(".3f"),
                    *(Spread.of([result[1] / 2**20 for result in results]).text(".1f") for results in (old, new)),
                    Spread.of([b[1] / a[1] for a, b in pairs]).text(".3f"),
                    f"{error:.1e}",
                ]
            )
    header = ["", "dense s", "documents s", "ratio", "dense MiB", "documents MiB", "ratio", "off by"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
