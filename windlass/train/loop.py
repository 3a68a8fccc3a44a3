"""The training loop."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from windlass.observe.stragglers import StepClock, StragglerWatch
from windlass.observe.watchdog import Heartbeat
from windlass.offload.tiers import OffloadFigures
from windlass.parallel.collectives import COMM, all_reduce
from windlass.parallel.mesh import Mesh
from windlass.train.agreement import Ending, StepAgreement
from windlass.train.build import Run
from windlass.train.signals import Request, StopRequest
from windlass.train.skipped_steps import divergence, has_diverged
from windlass.train.step import run_step


def train(run: Run, stop: StopRequest, heartbeat: Heartbeat) -> Ending:
    """Trains from `run.state.step` to the last step, or to the checkpoint after what a signal asked of any rank."""
    cfg, mesh, state = run.config.train, run.mesh, run.state
    fewest_nodes = run.config.launch.min_nodes if run.config.launch.is_elastic else mesh.num_nodes
    objective, scheduler, data = run.objective, run.scheduler, run.data
    clock, stragglers = StepClock(), StragglerWatch(mesh, run.metrics, run.console)
    stall_s = 0.0  # of the snapshot after the step before
    first_step = state.step
    if cfg.eval_first and state.step == 0:
        evaluate(run, heartbeat)
    while state.step < cfg.steps:
        heartbeat.begin_step()
        clock.begin()
        comm_bytes, offload = COMM.total_bytes, run.offload_figures
        batches = [next(data) for _ in range(cfg.grad_accum_steps)]
        # It comes in while the first forward runs.
        agreement = StepAgreement(sum(map(objective.num_targets, batches)), stop, mesh, fewest_nodes, clock.work_s)
        batches = [batch.to(mesh.device) for batch in batches]
        lr = run.optimizer.param_groups[0]["lr"]
        # A lazy copy of the weights ends before they move.
        stepped = run_step(run, batches, agreement.num_targets, before_update=run.wait_staged)
        stall_s += stepped.stall_s
        if stepped.is_finite:
            scheduler.step()
            state.skipped_in_a_row = 0
        else:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
            run.metrics.count_skipped_step(state.step + 1)
            run.console.message(f"step {state.step + 1} skipped: its gradients are not finite")
        state.step += 1
        state.tokens += agreement.num_targets()

        logged = run.metrics.step(
            state.step,
            loss=mean_loss(stepped.loss_sum, agreement.num_targets(), mesh) if run.metrics.due(state.step) else None,
            grad_norm=float(stepped.grad_norm) if run.metrics.due(state.step) else None,
            lr=lr,
            num_tokens=agreement.num_targets(),
            step_s=clock.end(),
            **step_figures(mesh, stall_s, COMM.total_bytes - comm_bytes),
            **offload_figures(run, offload),
        )
        if logged is not None:
            run.console.update(logged)
        heartbeat.end_step(state.step)
        stragglers.look(state.step - 1, agreement.work_s)
        if has_diverged(run, first_step):
            with heartbeat.watched(state.step):
                raise divergence(run)
        if evaluation_due(state.step, cfg.eval_every, cfg.steps):
            evaluate(run, heartbeat)
        # Last, so that a kill at any moment loses no line: what is not saved is trained, and recorded, again.
        run.record_snapshots()
        stall_s = 0.0
        if agreement.ending is not None or state.step == cfg.steps:
            stop.awaits = f"the checkpoint of step {state.step} to be written"
            stall_s = run.save()
            stop.awaits = "the run to end"
        elif run.checkpoint is not None and state.skipped_in_a_row:
            run.checkpoint.put_off(state.step)  # those from before must not be pushed out
        elif run.checkpoint is not None and run.checkpoint.due(state.step):
            # In memory it takes a moment: copy, parity and disk come behind. To a disk it may take any time.
            with nullcontext() if run.checkpoint.is_durable_only else heartbeat.watched(state.step):
                stall_s = run.snapshot()
        if agreement.ending is not None and state.step < cfg.steps:
            record_ending(run, agreement)
            return agreement.ending
    if run.last_evaluation is None:  # resumed at the end: nothing was left to train
        evaluate(run, heartbeat)
    run.metrics.event("done", state.step)
    return Ending.done


def evaluate(run: Run, heartbeat: Heartbeat) -> None:
    """The validation loss, of which a batch may take as long as a step."""
    with heartbeat.watched(run.state.step):
        run.evaluate(goes_on=heartbeat.begin_step)


def record_ending(run: Run, agreement: StepAgreement) -> None:
    """The event of an attempt that was asked to end."""
    if agreement.request == Request.leave:
        run.metrics.event("leaving", run.state.step, nodes=agreement.leaving_nodes)
    else:
        run.metrics.event("preempted" if agreement.request == Request.stop else "restarting", run.state.step)


def mean_loss(loss_sum: torch.Tensor, num_tokens: int, mesh: Mesh) -> float:
    """Nats a token over all ranks. `loss_sum` is this rank's."""
    return float(all_reduce(loss_sum.double(), mesh.data_group)) / num_tokens


def step_figures(mesh: Mesh, stall_s: float, comm_bytes: int) -> dict[str, float | int | None]:
    on_gpu = mesh.device.type == "cuda"
    return {
        "checkpoint/stall_s": stall_s,
        "comm/bytes": comm_bytes,
        "memory/device_peak_bytes": torch.cuda.max_memory_allocated(mesh.device) if on_gpu else None,
    }


def offload_figures(run: Run, before: OffloadFigures) -> dict[str, float | int]:
    """The costs of this rank's tiers since `before`; nothing where there are none."""
    if run.tiers is None:
        return {}
    figures = run.offload_figures.since(before)
    return {
        "offload/stall_s": figures.stall_s,
        "offload/read_bytes": figures.read_bytes,
        "offload/write_bytes": figures.write_bytes,
    }


def evaluation_due(step: int, eval_every: int, num_steps: int) -> bool:
    return step == num_steps or (eval_every > 0 and step % eval_every == 0)
