"""The agreement of ranks in every step: what they tell each other, and decide from it alike.

One all-reduce of a small vector on the host, behind the first forward pass, carries all of it: the tokens that count,
what signals have asked of each rank, and how long the step before was work for each. Every rank has the same sums, so
every rank decides the same.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property

import torch

from windlass.errors import EXIT_DONE, EXIT_RESTART, EXIT_STOPPED
from windlass.parallel.collectives import all_reduce_async, finish
from windlass.parallel.mesh import Mesh
from windlass.train.signals import Request, StopRequest

_TOKENS, _STOP, _RESTART, _LEAVE = range(4)
"""Places in the vector; from `_LEAVE` on there is one for each node, and then one for the work of each rank."""


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
    """The figures of a step that all ranks must know. The constructor begins; each question waits for what it needs.

    Args:
        num_targets: what the loss of this rank's batches is a sum over.
        fewest_nodes: a job that would be left with fewer stops as a whole instead.
        work_s: what this rank did not wait of the step before; None on all ranks where there was none.
    """

    def __init__(
        self, num_targets: int, stop: StopRequest, mesh: Mesh, fewest_nodes: int, work_s: float | None
    ) -> None:
        self._mesh, self._fewest_nodes, self._has_work = mesh, fewest_nodes, work_s is not None
        mine = [0.0] * (_LEAVE + mesh.num_nodes + mesh.world_size)
        mine[_TOKENS] = num_targets if mesh.counts_samples else 0
        mine[_STOP] = stop.asked == Request.stop
        mine[_RESTART] = stop.asked == Request.restart
        mine[_LEAVE + mesh.node] = stop.asked == Request.leave
        mine[_LEAVE + mesh.num_nodes + mesh.rank] = work_s or 0.0
        # float64 holds whole numbers to 2^53: more tokens than any step has.
        self._vector = torch.tensor(mine, dtype=torch.float64)
        self._pending = all_reduce_async(self._vector, mesh.world)

    @cached_property
    def _sums(self) -> list[float]:
        finish(self._pending)
        return self._vector.tolist()

    def num_targets(self) -> int:
        """Targets of all ranks' batches; at least 1, as it divides."""
        return max(1, int(self._sums[_TOKENS]))

    @property
    def work_s(self) -> list[float] | None:
        """The seconds of the step before that each rank did not wait for others, in rank order."""
        return self._sums[_LEAVE + self._mesh.num_nodes :] if self._has_work else None

    @property
    def leaving_nodes(self) -> list[int]:
        """The nodes that were asked to leave, whatever comes of it."""
        return [node for node in range(self._mesh.num_nodes) if self._sums[_LEAVE + node]]

    @property
    def request(self) -> Request:
        """The request that the job follows after this step."""
        leaving = self.leaving_nodes
        if self._sums[_STOP]:
            return Request.stop
        if leaving:
            return Request.leave if self._mesh.num_nodes - len(leaving) >= self._fewest_nodes else Request.stop
        return Request.restart if self._sums[_RESTART] else Request.nothing

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
