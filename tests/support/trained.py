"""That something was trained: what any test asserts before it compares two trainings, as nothing equals nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor


def assert_finite(losses: Sequence[float], num_steps: int | None = None) -> None:
    """Asserts that there are losses, `num_steps` if given, and that they are finite and not all the same."""
    assert losses and (num_steps is None or len(losses) == num_steps), f"{len(losses)} losses, not {num_steps}"
    assert all(math.isfinite(loss) for loss in losses), f"not finite: {losses}"
    assert len(losses) == 1 or len(set(losses)) > 1, f"every step has the loss {losses[0]}"


def assert_moved(before: Iterable[Tensor], after: Iterable[Tensor]) -> None:
    """Asserts that weights are finite, and that some have changed."""
    pairs = [(one.detach(), other.detach()) for one, other in zip(before, after, strict=True)]
    assert all(bool(other.isfinite().all()) for _, other in pairs), "weights are not finite"
    assert any(not bool((one == other).all()) for one, other in pairs), "no weight has changed"
