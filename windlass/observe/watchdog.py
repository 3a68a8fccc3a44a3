"""Ends a rank that makes no step any more, after it has written where it is.

Ranks that wait for a rank that hangs would wait until their collectives time out, and say nothing of why. Here a thread
of each rank looks at its heartbeat, the step that was begun last. Where one is late it raises an alarm in the job's
store; all ranks answer with the line that they are at, write the stacks of all their threads to their logs, and end,
so that their launcher starts them again. A rank whose interpreter is held cannot run that thread: a timer of
`faulthandler`, in C, which the thread keeps putting off, then writes the stacks and ends it. After MegaScale (Jiang et
al., 2024).
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TextIO, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from windlass.errors import EXIT_FAILURE
from windlass.observe.metrics import append_event
from windlass.outcome import OUTCOME_FILE
from windlass.parallel import collectives
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.mesh import Mesh, all_ranks_finite
from windlass.untrusted import Malformed, convert, parse_json

logger = logging.getLogger(__name__)

LONGEST_STEPS = 10
"""Where no timeout is set, a step may take as many times the longest so far,"""
LEAST_TIMEOUT_S = 120.0
"""but so long at least."""
FIRST_STEP_S = 600.0
"""The first step of an attempt compiles, and measures, and makes the optimizer's state."""
LOOK_S = 1.0
"""Between two looks at the heartbeat and for an alarm, at most; a tenth of a shorter timeout."""
LAST_WORDS_S = 1.0
"""For one rank to write the event, after the looks in which all ranks hear of an alarm; then all end."""
HELD_S = 10.0
"""How long after the timeout a rank whose interpreter is held is ended."""
STORE_S = 5.0

Result = TypeVar("Result")

_LOOP = str(Path(__file__).with_name("loop.py"))
_COLLECTIVES = {collectives.__file__, distributed_c10d.__file__}


class Heartbeat:
    """Hears of the loop's steps. This one tells nobody: where no launcher would start the rank again."""

    def begin_step(self) -> None: ...

    def end_step(self, step: int) -> None: ...

    @contextmanager
    def watched(self, step: int) -> Iterator[None]:
        """Lets what is in `with`, after `step`, take as long as a step."""
        self.begin_step()
        yield
        self.end_step(step)


@dataclass(frozen=True)
class RankStatus:
    """Where a rank is, and how long it has been in a step."""

    rank: int
    host: str
    is_waiting: bool
    """True if it waits for other ranks."""
    phase: str
    """The line of the training loop."""
    frame: str
    """The innermost call of Python."""
    late_s: float
    """Since it began a step; 0 between steps."""

    @staticmethod
    def of_main_thread(rank: int, late_s: float) -> RankStatus:
        ident = threading.main_thread().ident
        assert ident is not None
        innermost = sys._current_frames()[ident]
        frames = list(_outwards(innermost))
        waits = any(
            frame.f_code.co_filename in _COLLECTIVES or frame.f_code is all_ranks_finite.__code__ for frame in frames
        )
        in_loop = next((frame for frame in frames if frame.f_code.co_filename == _LOOP), None)
        phase = "" if in_loop is None else linecache.getline(_LOOP, in_loop.f_lineno).strip()
        code = innermost.f_code
        name = f"{code.co_name} ({code.co_filename}:{innermost.f_lineno})"
        return RankStatus(rank, socket.gethostname(), waits, phase, name, late_s)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@dataclass(frozen=True)
class Findings:
    """The answers of the ranks to an alarm."""

    statuses: Sequence[RankStatus]
    """The statuses of those that answered, in rank order."""
    silent: Sequence[int]
    """Ranks that did not: their machine, process or interpreter stands still."""

    @property
    def not_waiting(self) -> list[RankStatus]:
        return [status for status in self.statuses if not status.is_waiting]

    @property
    def late_s(self) -> float:
        return max(status.late_s for status in self.statuses)

    def describe(self, ranks_per_node: int) -> str:
        words = [f"rank {rank} (node {rank // ranks_per_node}) does not answer" for rank in self.silent]
        words += [f"rank {status.rank} on {status.host} is in {status.frame}" for status in self.not_waiting]
        return "; ".join(words) or "all ranks wait for each other"


class AlarmBell:
    """Lets the ranks of an attempt hear of an alarm and answer it: keys of the store on which they have met.

    A connection of its own, as the process group may be waiting on its one. Making it is collective.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        attempt = all_gather_object(uuid.uuid4().hex, mesh.world)[0]  # a store may outlive many attempts
        self._store: dist.Store | None = None
        if mesh.world_size > 1:
            if mesh.connect is not None:
                store = self._connection = mesh.connect(STORE_S)  # which torch does not hold
            else:
                host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = dist.TCPStore(host, port, None, False, timedelta(seconds=STORE_S), wait_for_workers=False)
            self._store = dist.PrefixStore(f"windlass/hang-{attempt}", store)

    def _try(self, ask: Callable[[dist.Store], Result], otherwise: Result) -> Result:
        """Returns what `ask` does; `otherwise` once there is no store: its node is lost, and the job soon is."""
        if self._store is None:
            return otherwise
        try:
            return ask(self._store)
        except RuntimeError as error:  # what torch's stores raise
            logger.warning("hangs are not told to other ranks any more: %s", str(error).splitlines()[0])
            self._store = None
            return otherwise

    def is_ringing(self) -> bool:
        return self._try(lambda store: store.check(["alarm"]), False)

    def ring(self) -> None:
        self._try(lambda store: store.set("alarm", ""), None)

    def answer(self, status: RankStatus) -> None:
        self._try(lambda store: store.set(f"place-{status.rank}", json.dumps(asdict(status))), None)

    def is_mine_to_tell(self) -> bool:
        """True if no other rank tells the user of this alarm."""
        return self._try(lambda store: store.add("told", 1) == 1, self._mesh.rank == 0)

    def findings(self, mine: RankStatus) -> Findings:
        statuses = {mine.rank: mine}
        for rank in range(self._mesh.world_size):
            text = self._try(lambda store, key=f"place-{rank}": store.get(key) if store.check([key]) else None, None)
            if text is not None:
                with suppress(Malformed):  # whoever wrote that, it does not say where the rank is
                    statuses[rank] = convert(parse_json(text), RankStatus)
        silent = [rank for rank in range(self._mesh.world_size) if rank not in statuses]
        return Findings([statuses[rank] for rank in sorted(statuses)], silent)


class Watchdog(Heartbeat):
    """Watches this rank from `with` on. What is between `end_step` and `begin_step`, such as a save to a disk, may take
    any time, unless it is `watched`; what is watched and calls `begin_step` has its time anew.

    Args:
        log: where stacks go, open as long as this.
        timeout_s: how long a step may take, after the first one; None: `LONGEST_STEPS` times the longest so far.
    """

    def __init__(self, run_dir: Path, mesh: Mesh, log: TextIO, timeout_s: float | None) -> None:
        self._run_dir, self._mesh, self._log, self._timeout_s = run_dir, mesh, log, timeout_s
        self._bell = AlarmBell(mesh)
        self._begun: float | None = None
        self._longest_s: float | None = None
        self._step: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def begin_step(self) -> None:
        self._begun = time.monotonic()

    def end_step(self, step: int) -> None:
        assert self._begun is not None
        self._longest_s = max(self._longest_s or 0.0, time.monotonic() - self._begun)
        self._begun, self._step = None, step

    @property
    def timeout_s(self) -> float:
        """The seconds that the step that comes may take."""
        if self._longest_s is None:
            return max(FIRST_STEP_S, self._timeout_s or 0.0)
        return self._timeout_s or max(LEAST_TIMEOUT_S, LONGEST_STEPS * self._longest_s)

    def _watch(self) -> None:
        while True:
            begun, timeout_s = self._begun, self.timeout_s
            late_s = 0.0 if begun is None else time.monotonic() - begun
            # Before anything that may keep this thread, too.
            faulthandler.dump_traceback_later(max(0.0, timeout_s - late_s) + HELD_S, exit=True, file=self._log)
            if late_s > timeout_s or self._bell.is_ringing():
                self._end_with_words(late_s)
            if self._ended.wait(self._look_s):
                return

    @property
    def _look_s(self) -> float:
        return LOOK_S if self._timeout_s is None else min(LOOK_S, self._timeout_s / 10)

    def _end_with_words(self, late_s: float) -> None:
        """Does not return."""
        status = RankStatus.of_main_thread(self._mesh.rank, late_s)
        self._write(f"step {self._step} was the last, and a next was begun {late_s:.1f} s ago; all threads:\n")
        faulthandler.dump_traceback(self._log)
        self._bell.answer(status)
        self._bell.ring()
        time.sleep(3 * self._look_s)  # the others look, answer, and write their stacks
        if self._mesh.rank != 0:
            time.sleep(LAST_WORDS_S)
        if self._bell.is_mine_to_tell():
            self._tell(self._bell.findings(status))
        if self._mesh.rank == 0:
            time.sleep(LAST_WORDS_S)
        os._exit(EXIT_FAILURE)

    def _write(self, text: str) -> None:
        os.write(self._log.fileno(), f"{time.strftime('%F %T')} watchdog: {text}".encode())

    def _tell(self, findings: Findings) -> None:
        sys.stderr.write(
            f"windlass: no step for {findings.late_s:.0f} s after step {self._step}: "
            f"{findings.describe(self._mesh.local_world_size)}; stacks are in {self._run_dir}/logs/\n"
        )
        sys.stderr.flush()
        append_event(
            self._run_dir,
            "hang",
            self._step,
            seconds=findings.late_s,
            silent=list(findings.silent),
            not_waiting=[asdict(status) for status in findings.not_waiting],
            num_waiting=len(findings.statuses) - len(findings.not_waiting),
        )


@contextmanager
def stacks_on_signal(log: TextIO) -> Iterator[None]:
    """SIGUSR2 has the stacks of all threads written to `log`, and ends nothing."""
    faulthandler.register(signal.SIGUSR2, file=log)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGUSR2)


def watch_for_hangs(
    run_dir: Path, mesh: Mesh, log: TextIO, timeout_s: float | None
) -> AbstractContextManager[Heartbeat]:
    """A `Watchdog` where a windlass launcher would start this rank again, else one that nobody looks at. Collective."""
    if OUTCOME_FILE not in os.environ:
        return nullcontext(Heartbeat())
    return Watchdog(run_dir, mesh, log, timeout_s)
