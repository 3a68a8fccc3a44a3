"""One step on made-up tokens before the first real one: a run that does not fit fails now and not in an hour."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from windlass.errors import EXIT_USER_ERROR, DoesNotFit
from windlass.machine.memory import LOW_WATER_FRACTION, host_memory
from windlass.offload.optimizer import OffloadedOptimizer
from windlass.outcome import report_outcome
from windlass.parallel.fragment import Tier, local_tensor
from windlass.train.step import forward_backward, made_up_batch

if TYPE_CHECKING:
    from windlass.train.build import StepParts

FIXES = (
    "lower train.batch_size (and raise train.grad_accum_steps), lower train.seq_len, "
    "set train.activation_checkpoint=full, use parallel=zero3 with more ranks, or choose a smaller model"
)


@dataclass(frozen=True)
class StepMemory:
    """The memory that a step of this rank needs."""

    optimizer_bytes: int
    """The size of optimizer state in memory."""
    free_bytes: int
    """The least free memory of the device. On a CPU that is the host's, which its ranks share."""


def mock_step(run: StepParts) -> StepMemory:
    """Runs forward, backward and optimizer at full size, and leaves weights, state and generators as they were.

    Raises:
        DoesNotFit: a device ran out of memory. (Where the host runs out, the process prints the same message and
            exits: Linux gives no error to catch.)
    """
    train = run.config.train
    batch = made_up_batch(run.objective, train.batch_size, train.seq_len).to(run.mesh.device)
    rng_state = torch.get_rng_state()
    device_rng_state = torch.cuda.get_rng_state() if run.mesh.device.type == "cuda" else None
    in_backward = run.engine.in_backward
    discarding = nullcontext() if in_backward is None else in_backward.discarding()
    # From the second pass on gradients are there, and more are like it.
    num_micro_batches = train.grad_accum_steps if run.is_fused else min(2, train.grad_accum_steps)
    if device_rng_state is not None:
        torch.cuda.reset_peak_memory_stats()
    try:
        with _host_memory_watched() as watch, discarding:
            forward_backward(run, [batch] * num_micro_batches, batch.labels.numel)
            optimizer_bytes = _step_without_effect(run.optimizer)
        return StepMemory(optimizer_bytes, watch.free_bytes if device_rng_state is None else _free_device_bytes())
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(run.mesh.device).total_memory
        raise DoesNotFit(
            "train.batch_size",
            train.batch_size,
            f"a step does not fit into the {total / 2**30:.1f} GiB of {run.mesh.device} ({error})",
            FIXES,
        ) from error
    finally:
        torch.set_rng_state(rng_state)
        if device_rng_state is not None:
            torch.cuda.set_rng_state(device_rng_state)
            torch.cuda.reset_peak_memory_stats()


@torch.no_grad()
def _step_without_effect(optimizer: torch.optim.Optimizer) -> int:
    """Makes the optimizer allocate its state, and returns its bytes; zero gradients at rate 0 change no bit."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.zero_grad(set_to_none=True)
        optimizer.reserve()
        return optimizer.state_bytes()[Tier.host]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.grad is not None:
                local_tensor(parameter.grad).zero_()
    type(optimizer).step(optimizer)  # not the instance's, which the scheduler has wrapped to count calls
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    values = [value for state in optimizer.state.values() for value in state.values()]
    num_bytes = sum(local_tensor(value).nbytes for value in values if isinstance(value, torch.Tensor))
    optimizer.state.clear()
    optimizer.zero_grad(set_to_none=True)
    return num_bytes


def _free_device_bytes() -> int:
    """The least free memory of the GPU since its peak was reset."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()


@dataclass
class _Watch:
    free_bytes: int
    """The least free memory of the host that was seen."""


@contextmanager
def _host_memory_watched() -> Iterator[_Watch]:
    """Ends the process with a message when the host is about to run out of memory."""
    done = threading.Event()
    seen = _Watch(host_memory()[0])

    def watch() -> None:
        while not done.wait(0.02):
            free, total = host_memory()
            seen.free_bytes = min(seen.free_bytes, free)
            if free < LOW_WATER_FRACTION * total:
                rss = psutil.Process().memory_info().rss
                error = DoesNotFit(
                    "train.batch_size",
                    "...",
                    f"the first step had used {rss / 2**30:.1f} GiB on this rank when only {free / 2**30:.2f} of the "
                    f"host's {total / 2**30:.1f} GiB were left",
                    FIXES,
                )
                sys.stderr.write(f"windlass: error: {error}\n")
                sys.stderr.flush()
                report_outcome(EXIT_USER_ERROR, str(error))
                os._exit(EXIT_USER_ERROR)

    watcher = threading.Thread(target=watch, name="windlass-memory-watch", daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
