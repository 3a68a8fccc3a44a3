"""What a step of each optimizer costs: time beside torch's fused AdamW, and bytes of state.

    python benchmarks/optimizers.py [--rounds 30] [--device cuda --width 2048 --layers 8] [--only apollo muon]
    python benchmarks/optimizers.py --memory      # state of the presets for each model size, counted without storage

All optimizers update copies of one model's matrices with the same gradients, taking turns; a figure is the median over
rounds of the ratio to AdamW in the same round. The limit is what memory and matrix products alone would take: the bytes
that the algorithm must read and write at the speed of a large copy, and the multiplications of its projections at the
speed of a large product, both measured in this run. The authors' packages are measured where they are installed
(pip install apollo-torch galore-torch).
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Spread, describe_machine, print_table
from torch import nn

from windlass.conf.compose import compose
from windlass.optim import Apollo, Cosmos, GaLore, Muon, NaturalGaLore, SGDSaI
from windlass.optim.base import MatrixOptimizer

STEPS_A_ROUND = 3
UPDATE_INTERVAL = 200


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    bar: float | None = None
    """At most this many times AdamW's time on a CPU."""
    gpu_bar: float | None = None
    words: Callable[[int, int, int], float] | None = None
    """(a, b, rank) -> elements that a step must read and write; None where no one would count them."""
    multiplications: Callable[[int, int, int], float] = lambda a, b, r: 0.0


def apollo_words(a: int, b: int, r: int) -> float:
    return 3 * a * b + 4 * max(a, b) * r  # weight in and out, gradient in, two moments in and out


def low_rank(parameters: list[nn.Parameter], rank: int, **keys: Any) -> list[dict[str, Any]]:
    return [{"params": parameters, "rank": rank, **keys}]


def contenders(rank: int) -> list[Contender]:
    mini = {"scale": 128.0, "granularity": "tensor"}
    return [
        Contender(
            "torch AdamW, fused",
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
            words=lambda a, b, r: 7 * a * b,
        ),
        Contender("torch AdamW, foreach", lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True)),
        Contender(
            "apollo",
            lambda parameters: Apollo(low_rank(parameters, rank)),
            bar=2.2,
            gpu_bar=1.5,
            words=apollo_words,
            multiplications=lambda a, b, r: a * b * r,
        ),
        Contender(
            "apollo_mini",
            lambda parameters: Apollo(low_rank(parameters, 1, **mini)),
            bar=1.5,
            words=lambda a, b, r: apollo_words(a, b, 1),
            multiplications=lambda a, b, r: a * b,
        ),
        Contender(
            "galore",
            lambda parameters: GaLore(low_rank(parameters, rank)),
            bar=2.5,
            words=lambda a, b, r: apollo_words(a, b, r) + min(a, b) * r,
            multiplications=lambda a, b, r: 2 * a * b * r,
        ),
        Contender("natural_galore", lambda parameters: NaturalGaLore(low_rank(parameters, rank))),
        Contender("muon", Muon, bar=5.0),
        Contender("cosmos", Cosmos, bar=12.0),
        Contender("sgd_sai", SGDSaI, words=lambda a, b, r: 5 * a * b),
        Contender("torch Muon", torch.optim.Muon),
        *peers(rank),
    ]


def peers(rank: int) -> list[Contender]:
    """The authors' packages, where they are installed."""
    found = []
    keys = {"rank": rank, "update_proj_gap": UPDATE_INTERVAL, "proj_type": "std"}
    apollo = {"scale": 1.0, "proj": "random", "scale_type": "channel"}
    mini = {"rank": 1, "scale": 128.0, "proj": "random", "scale_type": "tensor"}
    for name, module, attribute, settings in (
        ("apollo-torch APOLLO", "apollo_torch.apollo", "AdamW", keys | apollo),
        ("apollo-torch Mini", "apollo_torch.apollo", "AdamW", keys | mini),
        ("galore-torch GaLore", "galore_torch.adamw", "AdamW", keys | {"scale": 0.25}),
    ):
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            print(f"not measured: {name} ({error})")
            continue
        found.append(
            Contender(
                name,
                lambda parameters, kind=kind, settings=settings: kind(
                    [{"params": parameters, **settings}], no_deprecation_warning=True
                ),
            )
        )
    return found


class Entry:
    """A contender with parameters of its own."""

    def __init__(self, contender: Contender, shapes: list[tuple[int, int]], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.contender = contender
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(device)) for shape in shapes
        ]
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(1e-3).to(device)
        self.optimizer = contender.build(self.parameters)
        self.device = device
        for _ in range(3):  # state, projections, kernels
            self.optimizer.step()

    def step_s(self) -> float:
        """Mean seconds of a step between refreshes of projections."""
        self.wait()
        begin = clock(self.device)
        for _ in range(STEPS_A_ROUND):
            self.optimizer.step()
        self.wait()
        return (clock(self.device) - begin) / STEPS_A_ROUND

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def state_bytes(self) -> int:
        return sum(value.nbytes for state in self.optimizer.state.values() for value in tensors_of(state))


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors in a state, also in the objects that the authors' packages keep there."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return tensors_of(vars(value)) if hasattr(value, "__dict__") else []


def clock(device: torch.device) -> float:
    """Seconds. On a CPU those of this thread, which neighbours on the machine do not lengthen as much."""
    return time.thread_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.zeros(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device)


def multiplications_per_s(device: torch.device) -> float:
    size = 1024 if device.type == "cpu" else 8192
    one = torch.randn(size, size, device=device)
    return size**3 / timed(lambda: one @ one, device)


def timed(action: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(7):
        begin = clock(device)
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock(device) - begin)
    return sorted(seconds)[len(seconds) // 2]


def llama_shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """The matrices of Llama blocks: four of the attention, three of an MLP of 2.75 widths."""
    inner = width * 11 // 4
    return [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)] * layers


def memory_table() -> None:
    """GiB of optimizer state over all ranks, with every preset's defaults."""
    sizes = ("llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b")
    names = ("adamw", "sgd_sai", "muon", "cosmos", "natural_galore", "galore", "apollo", "apollo_mini")
    rows = []
    for name in names:
        cells = []
        for size in sizes:
            config = compose([f"model={size}", f"optim={name}", "model.vocab_size=32000"])
            model = config.model.build()
            optimizer = config.optim.build(model)
            if isinstance(optimizer, MatrixOptimizer):
                states = [optimizer.empty_state(parameter) for parameter in model.parameters()]
                num_bytes = sum(value.nbytes for state in states for value in state.values())
            else:
                num_bytes = sum(2 * 4 * parameter.numel() for parameter in model.parameters())
            cells.append(f"{num_bytes / 2**30:.2f}")
        rows.append([name, *cells])
    print_table(["GiB of state", *sizes], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, help="default: a quarter of the width")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="only count the state of each model size")
    parser.add_argument("--only", nargs="+", help="names that contain one of these, beside AdamW")
    options = parser.parse_args()
    if options.memory:
        memory_table()
        return
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shapes = llama_shapes(options.width, options.layers)
    rank = options.rank or options.width // 4
    numel = sum(a * b for a, b in shapes)
    machine = describe_machine()
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    print(f"{machine}\n{numel:,} parameters in {len(shapes)} matrices, width {options.width}, rank {rank}, "
          f"{options.threads} thread(s), {options.rounds} rounds")  # fmt: skip

    chosen = contenders(rank)
    if options.only:
        chosen = [chosen[0], *[one for one in chosen[1:] if any(part in one.name for part in options.only)]]
    entries = [Entry(contender, shapes, device) for contender in chosen]
    seconds: dict[str, list[float]] = {entry.contender.name: [] for entry in entries}
    copy_speed, product_speed = [], []
    for _ in range(options.rounds):
        copy_speed.append(copy_bytes_per_s(device))
        product_speed.append(multiplications_per_s(device))
        for entry in entries:
            seconds[entry.contender.name].append(entry.step_s())
    bandwidth, products = Spread.of(copy_speed), Spread.of(product_speed)
    print(f"copy {bandwidth.text('.3g')} bytes/s, products {products.text('.3g')} multiplications/s\n")
    report(entries, seconds, shapes, rank, bandwidth.median, products.median)


def report(
    entries: list[Entry],
    seconds: dict[str, list[float]],
    shapes: list[tuple[int, int]],
    rank: int,
    bandwidth: float,
    products: float,
) -> None:
    reference = seconds[entries[0].contender.name]
    adamw_bytes = entries[0].state_bytes()
    rows = []
    for entry in entries:
        contender, own = entry.contender, seconds[entry.contender.name]
        ratio = Spread.of([mine / other for mine, other in zip(own, reference, strict=True)])
        limit = ""
        if contender.words is not None:
            words = sum(contender.words(a, b, rank) for a, b in shapes)
            work = sum(contender.multiplications(a, b, rank) for a, b in shapes)
            limit_s = 4 * words / bandwidth + work / products
            limit = f"{limit_s / Spread.of(reference).median:.2f}"
        bar = contender.gpu_bar if entry.device.type == "cuda" else contender.bar
        held = "" if bar is None else ("met" if ratio.median <= bar else "MISSED")
        state = entry.state_bytes()
        rows.append(
            [
                contender.name,
                f"{1e3 * Spread.of(own).median:.2f}",
                ratio.text(".2f"),
                "" if bar is None else f"<= {bar:g}",
                held,
                limit,
                f"{state / 2**20:.2f}",
                f"{state / adamw_bytes:.2f}",
            ]
        )
    header = ["optimizer", "step ms", "over AdamW (range)", "bar", "", "limit over AdamW", "state MiB", "of AdamW's"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
