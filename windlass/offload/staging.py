"""Between a buffer of host memory and the device that computes with what is in it."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Copies to and from one device, on a stream of their own, so that they run beside what computes.

    On the CPU nothing is copied: the buffer is what computations use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begins a copy of `host`, which must stay as it is until the event; `wait` makes it usable."""
        if self._stream is None:
            return host, None
        with torch.cuda.stream(self._stream):
            copy = host.to(self.device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return copy, arrived

    def blank_like(self, host: Tensor) -> Tensor:
        """Memory on the device as large as `host`."""
        return host if self._stream is None else torch.empty_like(host, device=self.device)

    def wait(self, copy: Tensor, arrived: torch.cuda.Event | None) -> None:
        """Makes the computations that follow use `copy`."""
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            copy.record_stream(current)

    def synchronize(self) -> None:
        """Returns when every copy that was begun has ended."""
        if self._stream is not None:
            self._stream.synchronize()

    def to_host(self, copy: Tensor, host: Tensor) -> torch.cuda.Event | None:
        """Begins to bring back into `host` what the computations so far have made of `copy`; the event is its end."""
        if self._stream is None:
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(copy, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        copy.record_stream(self._stream)
        return arrived
