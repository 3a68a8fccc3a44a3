"""`windlass plan`: what a run will need of memory, disk and time, before it is started. Allocates nothing.

The forecast is made of four parts, none of them a formula of the model: what a step does (`plan_trace`), what a process
holds for that (`plan_memory`), how long it takes on this machine (`plan_time`), and what to change if it does not fit
(`plan_fixes`). Each figure comes with a range, and a run fits only if the upper end of its range does.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch

from windlass.checkpoint.config import COPIES_IN_MEMORY, CheckpointKind
from windlass.machine.memory import LOW_WATER_FRACTION, host_memory
from windlass.machine.speeds import Machine, existing_folder, process_kind, ssd_key
from windlass.observe.console import size
from windlass.plan.disk import DiskSpeed
from windlass.plan.memory import SMALL_OBJECTS, STREAMED_SMALL_OBJECTS, live_peak, replay
from windlass.plan.recorder import Trace
from windlass.plan.step_time import Range, StepTime, step_time
from windlass.plan.trace import trace_step
from windlass.train.config import ActivationCheckpoint, Device

if TYPE_CHECKING:
    from windlass.conf.schema import Config

SCALES_OF_SMALL_OBJECTS = (0.7, 0.85, 1.0, 1.25, 1.6)
"""Best fit is chaotic: a little more here or there moves the peak by several percent. So their mean counts."""
SCALE_OF_MANY = 2.0
"""For the upper end of the range."""
COLLECTIVES_SPREAD = 0.35
"""The share that several ranks may need more: gathered weights and gloo's copies cut up the heaps of several threads
more than the replay of one knows (up to 0.29 was seen)."""
PROCESS_SPREAD = 0.1
"""The error of a process's own memory, as a share of it."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Tiers:
    """Bytes of a rank in each tier. On a machine without GPUs the device's memory is the host's."""

    device: int = 0
    host: int = 0
    ssd: int = 0


@dataclass(frozen=True)
class Memory:
    """The memory of one rank, in bytes."""

    weights: int
    gradients: int
    """At the end of the backward pass."""
    optimizer: int
    activations: int
    """And temporaries: what there is at the peak beside weights, optimizer state and, where they are there by then,
    gradients."""
    allocator: int
    """Taken from the system and not in use at the peak: what lies between tensors of other sizes."""
    process: int
    """Python, torch and all that is there without a model."""
    buffers: int
    """For what is on its way to and from the disk."""
    persistent: Tiers
    """Between steps; in host memory without the buffers."""
    peak_tiers: Tiers
    """In a step, as expected; on the disk with what checkpoints keep of the step before."""
    peak: Range
    """In a step, of the tier that training computes in."""


@dataclass(frozen=True)
class Plan:
    """The forecast of a configuration."""

    num_parameters: int
    num_ranks: int
    memory: Memory
    time: StepTime
    tokens_per_s: float
    comm_bytes: int
    """Bytes of a rank and step."""
    ssd_read_bytes: int
    ssd_write_bytes: int
    """Bytes of a rank and step."""
    ssd_written_tb_per_day: float
    """By all ranks of this machine together."""
    bottleneck: str
    """`disk` or `compute`."""
    break_even_tokens: int | None
    """From so many tokens a step on the disk hides behind computing; None where none is used."""
    limit_bytes: int
    """Memory that the ranks of this machine together may take."""
    fits: bool
    disk_fits: bool
    reasons: list[str] = field(default_factory=list)

    @property
    def is_close(self) -> bool:
        """Expected to fit, but for checkpoints in memory, and not certain to."""
        return not self.fits and self.disk_fits and self.num_ranks * self.memory.peak.expected <= self.limit_bytes


def forecast(config: Config, num_ranks: int, machine: Machine) -> Plan:
    """The plan of a run of `num_ranks` on this machine.

    Args:
        machine: with its `process_bytes`; timings that are missing are added to it.

    Raises:
        ConfigError: the configuration cannot run.
    """
    trace, memory = _needs(config, num_ranks, machine)
    return judge(config, num_ranks, trace, memory, machine)


def forecast_if_fits(config: Config, num_ranks: int, machine: Machine) -> Plan | None:
    """As `forecast`; None, and nothing is timed, where the run does not fit."""
    trace, memory = _needs(config, num_ranks, machine)
    if not (_judge_memory(config, num_ranks, memory)[1] and _judge_disk(config, num_ranks, memory)[0]):
        return None
    return judge(config, num_ranks, trace, memory, machine)


def _needs(config: Config, num_ranks: int, machine: Machine) -> tuple[Trace, Memory]:
    trace = trace_step(config, num_ranks)
    kind = process_kind(num_ranks, config.train.dtype)
    num_versions = 1 if config.checkpoint.name == CheckpointKind.none else 2
    return trace, memory_of(trace, machine.process_bytes[kind], machine.process_end_bytes.get(kind, 0), num_versions)


def memory_of(trace: Trace, process: int, process_at_end: int = 0, num_versions: int = 1) -> Memory:
    """The memory of a rank that does what `trace` says.

    Args:
        process: bytes of the process without tensors, and `process_at_end` while the report is drawn.
        num_versions: of what is on the disk that may exist at a time.
    """
    small_objects = SMALL_OBJECTS if trace.mmap_threshold is None else STREAMED_SMALL_OBJECTS

    def high_water(scale: float) -> int:
        return replay(trace.memory, scale * small_objects, trace.mmap_threshold).high_water_bytes

    live = live_peak(trace.memory)
    on_disk = trace.disk_weights_bytes + trace.disk_optimizer_bytes
    heap_bytes = round(mean(high_water(scale) for scale in SCALES_OF_SMALL_OBJECTS))
    persistent = trace.weights_bytes + trace.optimizer_bytes - on_disk
    # The report is drawn in memory that steps have left free.
    expected = max(heap_bytes + process, persistent + trace.buffer_bytes + process_at_end)
    tight = high_water(0)
    loose = high_water(SCALE_OF_MANY)
    spread = PROCESS_SPREAD * process
    more = COLLECTIVES_SPREAD * expected if trace.comm_bytes else 0.0
    return Memory(
        weights=trace.weights_bytes,
        gradients=trace.gradient_bytes,
        optimizer=trace.optimizer_bytes,
        activations=live - persistent - trace.buffer_bytes,
        allocator=heap_bytes - live,
        process=process,
        buffers=trace.buffer_bytes,
        persistent=Tiers(host=persistent, ssd=on_disk),
        peak_tiers=Tiers(host=round(expected), ssd=num_versions * trace.disk_file_bytes),
        peak=Range(
            expected, min(expected, tight + process) - spread, max(loose + process, 1.03 * expected) + spread + more
        ),
    )


def judge(config: Config, num_ranks: int, trace: Trace, memory: Memory, machine: Machine) -> Plan:
    """Adds the time, and says whether it all fits."""
    train = config.train
    time = step_time(trace, machine, threads_of_rank(num_ranks), _disk_speed(config, num_ranks, trace, machine))
    step_tokens = num_ranks * train.batch_size * train.seq_len * train.grad_accum_steps
    written = sum(transfer.num_bytes for transfer in trace.transfers if transfer.is_write)
    limit, memory_fits, memory_reason = _judge_memory(config, num_ranks, memory)
    disk_fits, disk_reasons = _judge_disk(config, num_ranks, memory)
    return Plan(
        num_parameters=trace.num_parameters,
        num_ranks=num_ranks,
        memory=memory,
        time=time,
        tokens_per_s=step_tokens / time.step.expected,
        comm_bytes=trace.comm_bytes,
        ssd_read_bytes=sum(transfer.num_bytes for transfer in trace.transfers if not transfer.is_write),
        ssd_write_bytes=written,
        ssd_written_tb_per_day=num_ranks * written * SECONDS_A_DAY / time.step.expected / 1e12,
        bottleneck=time.bottleneck,
        break_even_tokens=_break_even_tokens(time, step_tokens),
        limit_bytes=limit,
        fits=memory_fits and disk_fits,
        disk_fits=disk_fits,
        reasons=[memory_reason, *disk_reasons, *_assumptions(config)],
    )


def _judge_memory(config: Config, num_ranks: int, memory: Memory) -> tuple[int, bool, str]:
    """The limit of all ranks together, whether they stay below it, and why."""
    available, total = host_memory()
    limit = available - int(LOW_WATER_FRACTION * total)
    copies = COPIES_IN_MEMORY[config.checkpoint.name]
    needed = num_ranks * (memory.peak.high + copies * memory.persistent.host)
    fits = needed <= limit
    return (
        limit,
        fits,
        f"{size(needed)} for {num_ranks} at the upper end of the range, with {copies} copies of the state for "
        f"checkpoint={config.checkpoint.name}, is {'within' if fits else 'above'} {size(limit)}: {size(available)} "
        f"of {size(total)} are free, and {LOW_WATER_FRACTION:.0%} must stay so",
    )


def _judge_disk(config: Config, num_ranks: int, memory: Memory) -> tuple[bool, list[str]]:
    """Judges if the disk has room for what the ranks put there, and says why."""
    folder = config.offload.folder(Path(config.run_dir))
    if folder is None:
        return True, []
    needed, free = num_ranks * memory.peak_tiers.ssd, free_bytes(folder)
    if needed <= free:
        return True, [f"{size(needed)} on the disk of offload.dir={folder} is within {size(free)} that are free"]
    fix = "free space there, or set offload.dir to a disk with more"
    if config.checkpoint.name != CheckpointKind.none:
        fix += "; checkpoints keep a second version of it"
    return False, [f"{size(needed)} on the disk of offload.dir={folder} is above {size(free)} that are free: {fix}"]


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that `folder` is to lie on."""
    return shutil.disk_usage(existing_folder(folder)).free


def _disk_speed(config: Config, num_ranks: int, trace: Trace, machine: Machine) -> DiskSpeed | None:
    """A rank's share of the disk; None where it is not used."""
    folder = config.offload.folder(Path(config.run_dir))
    if folder is None or not trace.transfers:
        return None
    speed = machine.ssd[ssd_key(folder)]
    has_spare_cores = num_ranks * threads_of_rank(num_ranks) < len(os.sched_getaffinity(0))
    return DiskSpeed(
        speed["read_bytes_per_s"] / num_ranks,
        speed["write_bytes_per_s"] / num_ranks,
        0.0 if has_spare_cores else speed["cpu_s_per_byte"],
    )


def _break_even_tokens(time: StepTime, step_tokens: int) -> int | None:
    """Tokens of a step that take as long to compute as the disk takes for the step; None where no disk is used."""
    if not time.disk_s:
        return None
    passes = time.kernels_s + time.overhead_s + time.comm_s - time.moving_s
    return max(1, round(step_tokens * max(0.0, time.disk_s - time.moving_s) / passes))


def _assumptions(config: Config) -> list[str]:
    """The costs that the run has and the forecast has not."""
    found = []
    if config.train.device == Device.cuda or (config.train.device == Device.auto and torch.cuda.is_available()):
        found.append(
            "assumed: a CPU computes, in the memory of the host; kernels and memory of a GPU are not known here"
        )
    if config.offload.max_activation_bytes is not None:
        found.append("assumed: offload.max_activation_bytes=null; what it moves to the disk is not taken off")
    if config.train.activation_checkpoint == ActivationCheckpoint.auto:
        found.append("assumed: train.activation_checkpoint=full; auto saves more where there is memory")
    if config.train.compile:
        found.append("assumed: train.compile=false")
    return found


def threads_of_rank(num_ranks: int) -> int:
    """Threads that a rank will compute with, as the launchers set them."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    return torch.get_num_threads() if num_ranks == 1 else max(1, len(os.sched_getaffinity(0)) // num_ranks)
