"""A limit on what an agent sends, over all of its connections, so that snapshots leave the network to the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SLICE_BYTES = 1 << 20
"""The most that is sent between two looks at the pacer."""
BURST_S = 0.05
"""After a pause, what would have been allowed in so much time may go at once."""


class Pacer:
    """A token bucket: what passes in any t seconds is at most rate * (t + `BURST_S`) and one slice.

    Args:
        bytes_per_s: the rate; None: no limit.
        clock: monotonic seconds.
        sleep: waits for so many seconds.

    Raises:
        ValueError: the rate is not above 0.
    """

    def __init__(
        self,
        bytes_per_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise ValueError(f"bytes_per_s must be above 0, or None: {bytes_per_s}")
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._paid_until = clock() - BURST_S
        self._lock = threading.Lock()

    @property
    def slice_bytes(self) -> int:
        """How much to take at a time: small enough that no connection makes the others wait long."""
        if self.bytes_per_s is None:
            return SLICE_BYTES
        return max(4096, min(SLICE_BYTES, int(self.bytes_per_s * BURST_S)))

    def take(self, num_bytes: int) -> None:
        """Waits until `num_bytes` more may be sent. First come, first served."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            now = self._clock()
            start = max(self._paid_until, now - BURST_S)
            self._paid_until = start + num_bytes / self.bytes_per_s
        if start > now:
            self._sleep(start - now)
