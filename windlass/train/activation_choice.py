"""`train.activation_checkpoint=auto`: what of the activations to save, to move and to compute again, from a trial step.

The trial saves as little as can be and so finds out what memory is left, whatever the optimizer, the cut and the tiers
take of it. With that, the machine's measured speed and a layer's costs, `choose_activations` chooses; that becomes
part of the configuration. A run that goes on keeps it: how many tokens' activations are computed again is part of the
bits that training comes to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from windlass.checkpoint.config import COPIES_IN_MEMORY
from windlass.conf.dotted_keys import flatten
from windlass.errors import ConfigError
from windlass.machine.measure import measure_speed
from windlass.machine.memory import LOW_WATER_FRACTION, host_memory
from windlass.machine.peak_flops import measured_matmul_flops
from windlass.machine.speeds import Machine, existing_folder, load_machine, save_machine, ssd_key
from windlass.models.config import LlamaConfig
from windlass.offload.config import OffloadKind
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.offload.saved_fraction import Activations, Choice, LayerCosts, Rates, choose_activations
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.fragment import Tier, local_tensor
from windlass.train.activation_costs import layer_costs
from windlass.train.config import ActivationCheckpoint, DType
from windlass.train.mock_step import StepMemory, mock_step
from windlass.untrusted import convert

if TYPE_CHECKING:
    from windlass.conf.schema import Config
    from windlass.train.build import StepParts

MARGIN = 0.1
"""The share of free memory that is left for what the trial has not met: an evaluation, pieces too small to use."""


@dataclass(frozen=True)
class Decision:
    """The settings that the configuration is to have, and the reasons."""

    activation_checkpoint: ActivationCheckpoint
    activation_fraction: float | None
    max_activation_bytes: int | None
    reasons: tuple[str, ...]

    def write_to(self, config: Config) -> None:
        config.train.activation_checkpoint = self.activation_checkpoint
        config.train.activation_fraction = self.activation_fraction
        config.offload.max_activation_bytes = self.max_activation_bytes

    def apply_to(self, parts: StepParts) -> None:
        """Has the passes, which `decide` tried with, run so."""
        parts.model.save_activations(self.activation_checkpoint == ActivationCheckpoint.full, self.activation_fraction)
        if self.max_activation_bytes is not None and parts.tiers is not None and parts.tiers.activations is None:
            parts.tiers.limit_activations(self.max_activation_bytes)


def decision_before(config: Config, before: Mapping[str, Any]) -> Decision | None:
    """Returns what the run of the plain configuration `before`, which `config` goes on with, was trained with.

    None where `config` says itself what to do. A limit that `config` gives is kept, and one is of use to a disk alone.
    """
    if config.train.activation_checkpoint != ActivationCheckpoint.auto:
        return None
    flat, limit = flatten(before), config.offload.max_activation_bytes
    try:  # of a checkpoint that was imported, or that a stranger wrote, it may say little or nonsense
        kind = ActivationCheckpoint(flat.get("train.activation_checkpoint"))
        fraction = convert(flat.get("train.activation_fraction"), float | None)
        if limit is None and config.offload.name == OffloadKind.ssd:
            limit = convert(flat.get("offload.max_activation_bytes"), int | None)
    except ValueError:
        return None
    replace(config.train, activation_checkpoint=kind, activation_fraction=fraction)  # its rules hold
    return Decision(kind, fraction, limit, (f"{kind}, as in the attempt before",))


def decide(parts: StepParts, say: Callable[[str], None]) -> Decision:
    """Tries a step and decides; the same on all ranks. Collective.

    Args:
        parts: of a model whose layers are computed again.
        say: tells the user what takes long.

    Raises:
        DoesNotFit: not even a step that saves the layers' inputs alone has room.
        OffloadError: the disk could not be measured.
    """
    mesh, model = parts.mesh, parts.config.model
    if not isinstance(model, LlamaConfig):
        rule = f"cannot be had with model={model.name}, of whose layers the costs are not known"
        raise ConfigError("train.activation_checkpoint", "auto", rule, "set train.activation_checkpoint=none or full")
    costs = _costs(parts, model)
    room = min(all_gather_object(_room(parts, mock_step(parts), costs, model.num_layers), mesh.world))
    return mesh.decide(lambda: _decide(parts, costs, model.num_layers, room, say))


def _costs(parts: StepParts, model: LlamaConfig) -> LayerCosts:
    """Costs of all layers."""
    train = parts.config.train
    return layer_costs(
        model,
        getattr(torch, train.dtype.value),
        train.batch_size,
        train.seq_len,
        parts.mesh.device,
        train.grad_accum_steps if parts.is_fused else 1,
    )


def _room(parts: StepParts, trial: StepMemory, costs: LayerCosts, num_layers: int) -> int:
    """Bytes that this rank's activations may take where they are made, the inputs that the trial saved included."""

    config, mesh, free = parts.config, parts.mesh, trial.free_bytes
    if mesh.device.type == "cpu":
        _, total = host_memory()
        free = (free - int(LOW_WATER_FRACTION * total)) // mesh.local_world_size
        weights = sum(local_tensor(parameter).untyped_storage().nbytes() for parameter in parts.model.parameters())
        free -= COPIES_IN_MEMORY[config.checkpoint.name] * (weights + trial.optimizer_bytes)
        if config.offload.name == OffloadKind.ssd and parts.tiers is not None:
            free -= parts.tiers.activation_buffer_bytes
    free -= trial.optimizer_bytes  # the trial makes it after its passes; later steps find it there
    room = max(0, int((1 - MARGIN) * free)) + num_layers * costs.input_bytes
    limit = config.offload.max_activation_bytes
    return room if limit is None else min(room, limit)


def _decide(parts: StepParts, costs: LayerCosts, num_layers: int, room: int, say: Callable[[str], None]) -> Decision:
    config, on_gpu = parts.config, parts.mesh.device.type == "cuda"
    rates = _rates(parts, _measured_machine(config, say))
    # On a GPU what has left it and is not on the disk yet lies in the buffers.
    host_bytes = parts.tiers.activation_buffer_bytes if on_gpu and rates.write_bytes_per_s and parts.tiers else 0
    choice = choose_activations(costs, num_layers, rates, room, host_bytes)
    kind = {
        Activations.recompute: ActivationCheckpoint.full,
        Activations.fraction: ActivationCheckpoint.fraction,
    }.get(choice.activations, ActivationCheckpoint.none)
    limit = config.offload.max_activation_bytes
    if limit is None and choice.host_bytes + choice.disk_bytes:
        limit = room
    return Decision(kind, choice.saved_fraction, limit, (_headline(choice), *choice.reasons))


def _headline(choice: Choice) -> str:
    share = f"{choice.saved_fraction or 0:.0%} of the tokens"
    how = {
        Activations.keep: "all activations are kept",
        Activations.swap: "all activations are kept or moved",
        Activations.fraction: f"activations of {share} are kept or moved, the others' computed again",
        Activations.recompute: "activations are computed again",
    }
    return f"{how[choice.activations]} (train.activation_checkpoint=auto)"


def _folder(config: Config) -> Path:
    """On the disk that activations would go to."""
    run_dir = Path(config.run_dir)
    return existing_folder(config.offload.folder(run_dir) or run_dir)


def _measured_machine(config: Config, say: Callable[[str], None]) -> Machine:
    machine, folder = load_machine(), _folder(config)
    if ssd_key(folder) not in machine.ssd or machine.memcpy_bytes_per_s is None or not machine.matmul_flops:
        say("measuring this machine's disk, memory and matrix products, once, for train.activation_checkpoint=auto")
        measure_speed(machine, folder)
        save_machine(machine)
    return machine


def _rates(parts: StepParts, machine: Machine) -> Rates:
    """This rank's share of the machine."""
    config, mesh = parts.config, parts.mesh
    write = read = None
    busy = (0.0, 0.0)
    if config.offload.name == OffloadKind.ssd:
        ssd = machine.ssd[ssd_key(_folder(config))]
        write, read = (ssd[key] / mesh.local_world_size for key in ("write_bytes_per_s", "read_bytes_per_s"))
        busy = _disk_busy_s(parts, write, read)
    dtype = config.train.dtype.value
    if mesh.device.type == "cuda":
        assert machine.host_to_device_bytes_per_s is not None and machine.device_to_host_bytes_per_s is not None
        bus = min(machine.host_to_device_bytes_per_s, machine.device_to_host_bytes_per_s)
        return Rates(machine.matmul_flops[dtype], write, read, host_bytes_per_s=bus, disk_busy_s=busy)
    # A machine that has a GPU was measured on that.
    flops = measured_matmul_flops(mesh.device, getattr(torch, dtype)) if torch.cuda.is_available() else None
    if flops is None:
        flops = machine.matmul_flops[dtype] * min(1.0, torch.get_num_threads() / len(os.sched_getaffinity(0)))
    assert machine.memcpy_bytes_per_s is not None
    return Rates(
        flops,
        write,
        read,
        copy_bytes_per_s=machine.memcpy_bytes_per_s / 2,  # which counts bytes read and bytes written
        memory_bytes_per_s=machine.memcpy_bytes_per_s * torch.get_num_threads(),
        disk_busy_s=busy,
    )


def _disk_busy_s(parts: StepParts, write_bytes_per_s: float, read_bytes_per_s: float) -> tuple[float, float]:
    """Seconds that optimizer state and weights take the disk in a forward and in a backward pass."""
    config, optimizer = parts.config, parts.optimizer
    assert isinstance(optimizer, OffloadedOptimizer)
    state = optimizer.state_bytes()[Tier.ssd]
    numel = 0
    if parts.is_fused:
        numel = sum(local_tensor(parameter).numel() for parameter in parts.model.parameters())
    in_pass = (2 if config.train.dtype == DType.bfloat16 else 4) * numel
    update_s = (state + 4 * numel - in_pass) / read_bytes_per_s + (state + 4 * numel) / write_bytes_per_s
    update_s /= 1 if parts.is_fused else config.train.grad_accum_steps  # one update to so many passes
    pass_s = in_pass / read_bytes_per_s
    if parts.engine.in_backward is not None:
        return pass_s, pass_s + update_s
    return pass_s + update_s, pass_s
