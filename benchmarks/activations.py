"""Claim: a long sequence's activations can lie on the disk, at hardly any time and with the same bits.

`python benchmarks/activations.py` trains one Llama on one long sequence in several ways, each in a process of its own,
in rounds that take turns:

- `keep`: autograd keeps what it saves. What the others are held against.
- `swap`: at most `--near-mib` of it stay in memory, the rest goes to the disk (`--dir`) and comes back.
- `fraction=...`: the same, with the attention's output and a layer's input for all tokens and the rest for a part of
  them; the others' is computed again.
- `recompute`: `train.activation_checkpoint=full` with what it keeps swapped too.

Printed for each: seconds of a forward and a backward pass (median) and their ratio to `keep`, by how much the process
grew at most (gradients, buffers and all), what of the activations was in memory at most, bytes to the disk, seconds
that a pass stood still, and whether losses and gradients have the bits of `keep` (`fraction` rounds gradients
otherwise: the largest relative difference of one). Then what `choose_activations` would have chosen by this machine's
figures.

Bars: `swap` has the bits of `keep`, and activations in memory stay within `--near-mib`, the buffers and one layer.
Timings are printed and never asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from common import describe_machine, num_cores, print_json, print_table, run_ranks

from windlass.data.batch import Batch
from windlass.machine.peak_flops import measured_matmul_flops
from windlass.models.config import LlamaConfig
from windlass.models.llama import Llama
from windlass.offload.activations import ActivationFigures, ActivationOffload
from windlass.offload.arena import Arena
from windlass.offload.direct_io import Engine
from windlass.offload.saved_fraction import Activations, Rates, choose_activations
from windlass.offload.tier_file import TierFolder
from windlass.train.activation_costs import layer_costs
from windlass.train.objectives.config import NextTokenConfig
from windlass.train.step import forward

MIB = 1 << 20
CPU = torch.device("cpu")
PROBE_BYTES = 256 * MIB


@dataclass(frozen=True)
class Settings:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    seq_len: int
    dtype: str
    steps: int
    near_bytes: int
    buffer_bytes: int
    dir: Path

    @property
    def model(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=512,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.hidden_size // 64,
            num_kv_heads=self.hidden_size // 64,
            tie_embeddings=False,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Variant:
    name: str
    activations: Activations
    saved_fraction: float | None = None


@dataclass
class Outcome:
    pass_s: list[float]
    peak_bytes: int
    """By which the process grew, from when it had the weights."""
    near_bytes: int
    disk_bytes: int
    stall_s: float
    losses: list[float]


def main() -> None:
    options = parse()
    settings = Settings(
        options.hidden,
        options.hidden * 8 // 3 // 16 * 16,
        options.layers,
        options.seq_len,
        options.dtype,
        options.steps,
        options.near_mib * MIB,
        options.buffer_mib * MIB,
        options.dir,
    )
    variants = [
        Variant("keep", Activations.keep),
        Variant("swap", Activations.swap),
        *(Variant(f"fraction={fraction}", Activations.fraction, fraction) for fraction in options.fraction),
        Variant("recompute", Activations.recompute),
    ]
    outcomes: dict[str, list[Outcome]] = {variant.name: [] for variant in variants}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for _ in range(options.rounds):
            for variant in variants:
                reference = Path(folder) / "keep.pt"
                [outcome] = run_ranks(run, 1, replace(settings, dir=Path(folder)), variant, reference)
                outcomes[variant.name].append(outcome)
        differences = {variant.name: read_difference(Path(folder) / f"{variant.name}.txt") for variant in variants}
        rates = measure_rates(replace(settings, dir=Path(folder)))
    report(options, settings, variants, outcomes, differences, rates)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--fraction", type=float, nargs="*", default=[0.5, 0.0])
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first is not timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--near-mib", type=int, default=64)
    parser.add_argument("--buffer-mib", type=int, default=128)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk that activations go to")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def run(settings: Settings, variant: Variant, reference: Path) -> Outcome:
    """One variant in a process of its own."""
    torch.set_num_threads(num_cores())
    model = settings.model.build()
    assert isinstance(model, Llama)
    is_recomputed = variant.activations == Activations.recompute
    model.prepare(settings.torch_dtype, is_recomputed, compile_blocks=False, saved_fraction=variant.saved_fraction)
    model.materialize(CPU, seed=0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 512, (1, settings.seq_len + 1), generator=generator)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]))
    engine = Engine(num_threads=8)
    folder = TierFolder(settings.dir, engine, "activations")
    arena = Arena(settings.buffer_bytes)
    is_moved = variant.activations != Activations.keep
    offload = ActivationOffload(CPU, settings.near_bytes, arena, folder) if is_moved else None
    objective = NextTokenConfig().build()
    base = peak_rss()
    pass_s, losses = [], []
    for _ in range(settings.steps):
        model.zero_grad(set_to_none=False)
        begin = time.perf_counter()
        with offload.offloaded() if offload is not None else contextlib.nullcontext():
            [loss_sum] = forward(model, objective, [batch], mask_documents=False, keep_logits=False)
        loss = loss_sum / settings.seq_len
        loss.backward()
        pass_s.append(time.perf_counter() - begin)
        losses.append(loss.item())
    figures = ActivationFigures() if offload is None else offload.figures
    outcome = Outcome(
        pass_s[1:],
        peak_rss() - base,
        figures.peak_near_bytes,
        figures.write_bytes // settings.steps,
        figures.stall_s / settings.steps,
        losses,
    )
    del loss, loss_sum
    compare(model, reference, variant)
    if offload is not None:
        offload.close()
    folder.close()
    engine.close()
    return outcome


def peak_rss() -> int:
    """Of this process; `getrusage` would count its parent's from before the exec."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024


def compare(model: Llama, reference: Path, variant: Variant) -> None:
    """Writes the largest relative difference of a gradient from those of `keep`, which it keeps."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if variant.activations == Activations.keep:
        torch.save(gradients, reference)
    expected = torch.load(reference, weights_only=True)
    largest = max(float((gradients[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
    has_same_bits = all(torch.equal(gradients[name], expected[name]) for name in expected)
    reference.with_name(f"{variant.name}.txt").write_text("same bits" if has_same_bits else f"{largest:.1e}")


def read_difference(path: Path) -> str:
    return path.read_text()


def measure_rates(settings: Settings) -> Rates:
    """What this machine does now, with as many threads and as large transfers as the variants have."""
    torch.set_num_threads(num_cores())
    engine = Engine(num_threads=8)
    folder = TierFolder(settings.dir, engine, "probe")
    arena = Arena(PROBE_BYTES)
    data = arena.allocate(PROBE_BYTES).data
    file = folder.create(PROBE_BYTES)
    data.fill_(1)
    seconds = {}
    for name, move in (("write", file.write), ("read", file.read)):
        move(data).wait()
        begin = time.perf_counter()
        move(data).wait()
        seconds[name] = time.perf_counter() - begin
    other = torch.empty_like(data).fill_(2)
    begin = time.perf_counter()
    other.copy_(data)
    copy_s = time.perf_counter() - begin
    folder.close()
    engine.close()
    return Rates(
        flops_per_s=measured_matmul_flops(CPU, settings.torch_dtype),
        write_bytes_per_s=PROBE_BYTES / seconds["write"],
        read_bytes_per_s=PROBE_BYTES / seconds["read"],
        copy_bytes_per_s=PROBE_BYTES / copy_s,
    )


def report(
    options: argparse.Namespace,
    settings: Settings,
    variants: list[Variant],
    outcomes: dict[str, list[Outcome]],
    differences: dict[str, str],
    rates: Rates,
) -> None:
    seconds = {name: median(s for outcome in found for s in outcome.pass_s) for name, found in outcomes.items()}
    costs = layer_costs(settings.model, settings.torch_dtype, 1, settings.seq_len, CPU)
    choice = choose_activations(costs, settings.num_layers, rates, settings.near_bytes)
    if options.json:
        print_json(
            {
                "machine": describe_machine(),
                "settings": {**asdict(settings), "dir": str(settings.dir)},
                "outcomes": {name: [asdict(outcome) for outcome in found] for name, found in outcomes.items()},
                "gradients": differences,
                "rates": asdict(rates),
                "choice": asdict(choice),
            }
        )
        return
    rows = []
    for variant in variants:
        found = outcomes[variant.name]
        rows.append(
            (
                variant.name,
                f"{seconds[variant.name]:.2f}",
                f"{seconds[variant.name] / seconds['keep']:.2f}",
                f"{max(outcome.peak_bytes for outcome in found) / MIB:,.0f}",
                "all" if variant.name == "keep" else f"{max(outcome.near_bytes for outcome in found) / MIB:,.0f}",
                f"{found[0].disk_bytes / MIB:,.0f}",
                f"{median(outcome.stall_s for outcome in found):.2f}",
                "same bits" if found[0].losses == outcomes["keep"][0].losses else "differ",
                differences[variant.name],
            )
        )
    header = (
        "",
        "s a pass",
        "/ keep",
        "peak growth, MiB",
        "in memory, MiB",
        "to disk, MiB",
        "stall, s",
        "loss",
        "gradients",
    )
    print_table(header, rows)
    layer_bytes = costs.input_bytes + costs.attention_bytes + costs.rest_bytes
    bar = settings.near_bytes + layer_bytes
    most = max(outcome.near_bytes for outcome in outcomes["swap"])
    print(
        f"\nswap: {most / MIB:,.0f} MiB of activations in memory at most (bar: {bar / MIB:,.0f}, the limit and a layer)"
    )
    print(f"swap: gradients: {differences['swap']} (bar: same bits)")
    print(
        f"\nchoose_activations, from {rates.flops_per_s / 1e9:,.0f} GFLOP/s, "
        f"{(rates.write_bytes_per_s or 0) / 1e9:.2f} GB/s to and {(rates.read_bytes_per_s or 0) / 1e9:.2f} GB/s from "
        f"the disk: {choice.activations.value}"
    )
    for reason in choice.reasons:
        print(f"  {reason}")


if __name__ == "__main__":
    main()
