"""Waits of a GPU's stream. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from windlass.parallel.waiting import WaitClock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_stream_that_waits_for_another_is_counted_and_the_host_goes_on() -> None:
    clock = WaitClock()
    clock.lap()
    other, begin, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        begin.record()
        torch.cuda._sleep(200_000_000)  # cycles
        end.record()
    with clock.on(torch.device("cuda")):
        torch.cuda.current_stream().wait_stream(other)
    lap = clock.lap()
    assert lap.seconds == 0.0, "it has not passed yet"
    torch.cuda.synchronize()
    assert lap.seconds >= 0.5 * begin.elapsed_time(end) / 1000
    assert clock.lap().seconds == 0.0
