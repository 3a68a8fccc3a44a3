"""Steps that are skipped, as their gradients are not finite: how many in a row end a run, and what it says then.

While steps are skipped no checkpoint and no snapshot is taken, so those from before are not pushed out by what may be
broken. Only a run that is asked to stop, or whose steps are over, is saved; retention then deletes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from windlass.checkpoint.durable.manifest import step_folder
from windlass.errors import Diverged
from windlass.text import override

if TYPE_CHECKING:
    from windlass.train.build import Run


def has_diverged(run: Run, first_step: int) -> bool:
    """True if the last step was one skipped step too many. The same on all ranks.

    Args:
        first_step: how many steps were made when this attempt began: one whose steps were all skipped is not done.
    """
    train, state = run.config.train, run.state
    is_all = state.step == train.steps and state.skipped_in_a_row >= state.step - first_step
    most = train.max_skipped_steps
    return is_all or (most is not None and state.skipped_in_a_row >= most)


def divergence(run: Run) -> Diverged:
    """Ends what is being written, and returns the error that ends the run. Collective."""
    train, state, checkpoint = run.config.train, run.state, run.checkpoint
    first = state.step - state.skipped_in_a_row + 1
    run.metrics.event("diverged", state.step, skipped_in_a_row=state.skipped_in_a_row)
    steps: list[int] = []
    is_in_memory = False
    if checkpoint is not None:
        checkpoint.finish()
        steps = run.mesh.decide(checkpoint.store.steps)
        # Where none is on a disk yet, the snapshot in memory goes there when the run has ended.
        is_in_memory = not steps and checkpoint.has_any()
    before = [step for step in steps if step < first]
    run.record_snapshots()
    lower = f"a lower optim.lr, such as optim.lr={run.config.optim.lr / 10:g}"
    if checkpoint is not None and (before or is_in_memory):
        origin = step_folder(checkpoint.store.location, before[-1]) if before else checkpoint.store.location
        which = f"that of step {before[-1]}" if before else "the newest"
        fix = f"begin another run from {which}: another run_dir, {override('resume', origin)} and {lower}"
        kept = "the checkpoints from before them are kept"
    else:
        fix = f"begin again in another run_dir, with {lower}"
        kept = "there is no checkpoint from before them"
    most = train.max_skipped_steps
    if most is not None and state.skipped_in_a_row >= most:
        fix += f"; or set train.max_skipped_steps={2 * most} if such steps are to be expected"
    error = Diverged(
        "train.max_skipped_steps",
        most,
        f"steps {first} to {state.step} were skipped, as their gradients are not finite; {kept}",
        fix,
    )
    error.on_all_ranks = True
    return error


def warning_at_the_end(run: Run) -> list[str]:
    """Returns what to say of a run that is done, though its last steps were skipped."""
    count = run.state.skipped_in_a_row
    if count == 0:
        return []
    return [f"warning: the last {count} steps were skipped, as their gradients were not finite"]
