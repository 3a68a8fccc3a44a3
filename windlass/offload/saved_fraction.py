"""Chooses which activations to keep, to move and to compute again, so that the modelled step time is least.

To move a byte costs time on the way out and on the way back, which is hidden as long as computations take longer; to
compute it again costs operations, which nothing hides. So more tokens' activations are moved (see MEMO's alpha in
`windlass.models.token_wise`) until the step time stops falling: until the links or the disk are what a pass waits for.

MEMO: Fine-grained Tensor Management For Ultra-long Context LLM Training, 2024. Fuyou (Adding NVMe SSDs to Enable and
Accelerate 100B Model Fine-tuning on a Single GPU, 2024) has the step time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from windlass.errors import DoesNotFit

NUM_PARTS = 64
"""Fractions that are tried are multiples of one part: figures that differ a little choose the same."""
TOLERANCE = 1e-3
"""A smaller share of the step time is not worth more bytes."""
MIB = 1 << 20


class Activations(StrEnum):
    """The fate of a layer's activations between its forward and its backward pass."""

    keep = "keep"
    """They stay."""
    swap = "swap"
    """All are moved as far as there is no room."""
    fraction = "fraction"
    """Those of a fraction of the tokens; the others are computed again."""
    recompute = "recompute"
    """The layer's input alone is kept, and moved as far as there is no room."""


@dataclass(frozen=True)
class LayerCosts:
    """The costs of a layer in one forward pass of this rank; in all micro-batches of a step, where these are fused."""

    input_bytes: int
    attention_bytes: int
    """The attention's output and what its backward pass needs besides queries, keys and values."""
    rest_bytes: int
    """The rest of what autograd saves."""
    forward_flops: float
    rest_flops: float
    """To compute `rest_bytes` again from the layer's input and the attention's output."""
    forward_touched_bytes: int = 0
    """Read and written by what is no product: norms, rotations, gates."""
    rest_touched_bytes: int = 0
    """The part of them that computes `rest_bytes` again."""


@dataclass(frozen=True)
class Rates:
    """The share of the machine that this rank gets."""

    flops_per_s: float
    write_bytes_per_s: float | None = None
    """The disk's; None where there is none."""
    read_bytes_per_s: float | None = None
    host_bytes_per_s: float | None = None
    """Between a GPU and the host, one way; None on a CPU."""
    copy_bytes_per_s: float | None = None
    """On a CPU: of the copy between a tensor and a buffer, which the computation waits for. None takes no time."""
    memory_bytes_per_s: float | None = None
    """The rate of kernels that go through memory and hardly compute. None: they take no time."""
    disk_busy_s: tuple[float, float] = (0.0, 0.0)
    """Seconds that the disk is busy with other things (state, weights) in a forward and in a backward pass."""


@dataclass(frozen=True)
class Choice:
    """A choice, and its expected costs."""

    activations: Activations
    saved_fraction: float | None
    """With `Activations.fraction`; never 1, which is `swap`."""
    pass_s: float
    """A forward and a backward pass of the layers."""
    saved_bytes: int
    host_bytes: int
    """The saved bytes that move from the GPU to the host."""
    disk_bytes: int
    """The saved bytes that move to the disk."""
    reasons: tuple[str, ...] = ()
    """For people: what weighed, and the times of the choice and of the ends of what was tried."""


def choose_activations(
    costs: LayerCosts, num_layers: int, rates: Rates, near_bytes: int, host_bytes: int = 0
) -> Choice:
    """The least modelled time of a pass; of equals, the fewest bytes moved.

    Args:
        near_bytes: what activations may take where they are made: on a GPU of its memory, on a CPU of the host's.
        host_bytes: on a GPU, what they may take of the host's; what is more goes to the disk.

    Raises:
        DoesNotFit: there is no disk, and not even the layers' inputs have room.
    """
    model = _Model(costs, num_layers, rates, near_bytes, host_bytes)
    candidates = [model.recompute(), *(model.with_fraction(part / NUM_PARTS) for part in range(NUM_PARTS + 1))]
    possible = [choice for choice in candidates if choice is not None]
    if not possible:
        raise DoesNotFit(
            "offload.max_host_bytes",
            host_bytes,
            f"the inputs of {num_layers} layers take {costs.input_bytes * num_layers:,} bytes, and there is no disk "
            f"for what the device ({near_bytes:,} bytes) and the host have no room for",
            "choose offload=ssd, give more memory, or lower train.batch_size or train.seq_len",
        )
    least_s = min(choice.pass_s for choice in possible)
    best = next(choice for choice in possible if choice.pass_s <= least_s * (1 + TOLERANCE))
    if possible[-1].activations == Activations.keep:
        best = possible[-1]  # nothing moves: keeping less gains nothing
    return replace(best, reasons=model.reasons(best, possible))


@dataclass(frozen=True)
class _Model:
    costs: LayerCosts
    num_layers: int
    rates: Rates
    near_bytes: int
    host_bytes: int

    def with_fraction(self, saved_fraction: float) -> Choice | None:
        """The choice to save this fraction; None if it has no room."""
        costs = self.costs
        saved = self.num_layers * (costs.input_bytes + costs.attention_bytes + round(saved_fraction * costs.rest_bytes))
        again_s = (1 - saved_fraction) * self._compute_s(costs.rest_flops, costs.rest_touched_bytes)
        return self._choice(
            Activations.fraction if saved_fraction < 1 else Activations.swap, saved_fraction, saved, again_s
        )

    def recompute(self) -> Choice | None:
        saved = self.num_layers * self.costs.input_bytes
        return self._choice(Activations.recompute, 0.0, saved, self._forward_s())

    def _forward_s(self) -> float:
        return self._compute_s(self.costs.forward_flops, self.costs.forward_touched_bytes)

    def _compute_s(self, flops: float, touched_bytes: int) -> float:
        """All layers'."""
        memory = self.rates.memory_bytes_per_s
        return self.num_layers * (flops / self.rates.flops_per_s + (touched_bytes / memory if memory else 0.0))

    def _choice(self, activations: Activations, saved_fraction: float, saved: int, again_s: float) -> Choice | None:
        rates = self.rates
        is_on_gpu = rates.host_bytes_per_s is not None
        moved = max(0, saved - self.near_bytes)
        to_disk = max(0, moved - self.host_bytes) if is_on_gpu else moved
        if to_disk and (rates.write_bytes_per_s is None or rates.read_bytes_per_s is None):
            return None
        if activations == Activations.swap and moved == 0:
            activations = Activations.keep
        to_host = moved if is_on_gpu else 0  # what goes to the disk goes by the host
        forward_s = self._forward_s()
        copy_s = 0.0 if rates.copy_bytes_per_s is None else to_disk / rates.copy_bytes_per_s
        link_s = 0.0 if rates.host_bytes_per_s is None else to_host / rates.host_bytes_per_s
        write_s = to_disk / rates.write_bytes_per_s if rates.write_bytes_per_s else 0.0
        read_s = to_disk / rates.read_bytes_per_s if rates.read_bytes_per_s else 0.0
        pass_s = max(forward_s + copy_s, link_s, write_s + rates.disk_busy_s[0])
        pass_s += max(2 * forward_s + again_s + copy_s, link_s, read_s + rates.disk_busy_s[1])
        given = saved_fraction if activations == Activations.fraction else None
        return Choice(activations, given, pass_s, saved, to_host, to_disk)

    def reasons(self, best: Choice, possible: list[Choice]) -> tuple[str, ...]:
        costs, layers = self.costs, self.num_layers
        always, rest = costs.input_bytes + costs.attention_bytes, costs.rest_bytes
        again_s = self._compute_s(costs.rest_flops, costs.rest_touched_bytes)
        seconds = (
            f"{_name(choice)} {choice.pass_s:.3g} s" for choice in dict.fromkeys([best, *possible[:2], possible[-1]])
        )
        return (
            f"{layers} layers save {_mib(layers * always)} for all tokens (inputs and attention) and "
            f"{_mib(layers * rest)} that take {again_s:.3g} s to compute again",
            f"{_mib(self.near_bytes)} may stay; {_mib(best.host_bytes)} go to the host, "
            f"{_mib(best.disk_bytes)} to the disk",
            f"modelled, forward and backward: {', '.join(seconds)}",
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"


def _name(choice: Choice) -> str:
    return choice.activations.value if choice.saved_fraction is None else f"fraction={choice.saved_fraction:.3g}"
