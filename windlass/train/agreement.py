"""What ranks tell each other in every step, and what they decide from it alike.

One all-reduce of a small vector on the host, behind the first forward pass, carries all of it: the tokens that count,
and what signals have asked of each rank. Every rank has the same sums, so every rank decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch

from windlass.errors import EXIT_DONE, EXIT_RESTART, EXIT_STOPPED
from windlass.parallel.collectives import all_reduce_async, finish
from windlass.parallel.mesh import Mesh
from windlass.train.data.loader import Batch
from windlass.train.loss import count_tokens
from windlass.train.signals import Request, StopRequest

_TOKENS, _STOP, _RESTART, _LEAVE = range(4)
"""Places in the vector; from `_LEAVE` on there is one for each node."""


class Ending(StrEnum):
    """Why a rank ended its training."""

    done = "done"
    stopped = "stopped"
    """The whole job was asked to; the same command resumes."""
    left = "left"
    """The rank's node was asked to leave a job that goes on without it."""
    restarting = "restarting"
    """The rank's launcher starts it again, among other nodes."""

    @property
    def exit_code(self) -> int:
        return {Ending.done: EXIT_DONE, Ending.restarting: EXIT_RESTART}.get(self, EXIT_STOPPED)


class StepAgreement:
    """What all ranks must know of a step. Begun by the constructor; each property waits for what it needs.

    Args:
        fewest_nodes: a job that would be left with fewer stops as a whole instead.
    """

    def __init__(self, batches: Sequence[Batch], stop: StopRequest, mesh: Mesh, fewest_nodes: int) -> None:
        self._mesh, self._fewest_nodes = mesh, fewest_nodes
        # float64 holds whole numbers to 2^53: more tokens than any step has.
        self._sums = torch.zeros(_LEAVE + mesh.num_nodes, dtype=torch.float64)
        self._sums[_TOKENS] = count_tokens(batches)
        self._sums[_STOP] = stop.asked == Request.stop
        self._sums[_RESTART] = stop.asked == Request.restart
        self._sums[_LEAVE + mesh.node] = stop.asked == Request.leave
        self._work = all_reduce_async(self._sums, mesh.host_group)

    def _wait(self) -> list[float]:
        finish(self._work)
        self._work = None
        return self._sums.tolist()

    @property
    def num_tokens(self) -> int:
        """Labels that count, of all ranks' batches; at least 1, as it divides."""
        return max(1, int(self._wait()[_TOKENS]))

    @property
    def leaving_nodes(self) -> list[int]:
        """The nodes that were asked to leave, whatever comes of it."""
        return [node for node in range(self._mesh.num_nodes) if self._wait()[_LEAVE + node]]

    @property
    def request(self) -> Request:
        """What the job does after this step."""
        sums, leaving = self._wait(), self.leaving_nodes
        if sums[_STOP]:
            return Request.stop
        if leaving:
            return Request.leave if self._mesh.num_nodes - len(leaving) >= self._fewest_nodes else Request.stop
        return Request.restart if sums[_RESTART] else Request.nothing

    @property
    def ending(self) -> Ending | None:
        """How this rank ends after this step; None: it goes on."""
        request = self.request
        if request == Request.nothing:
            return None
        if request == Request.stop:
            return Ending.stopped
        is_leaving = request == Request.leave and self._mesh.node in self.leaving_nodes
        return Ending.left if is_leaving else Ending.restarting
