"""The two files through which a worker and its launcher understand each other; the launcher names them.

A launcher starts every worker again that exits with another code than 0. A worker that was asked to stop, or that
refused bad input, must not be started again: it leaves its code in the outcome file. And a request to stop that comes
before a worker is there reaches nobody: the launcher leaves a stop file for those that come next. Launchers of several
nodes pass an outcome on to each other.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from windlass.errors import EXIT_DONE, EXIT_STOPPED
from windlass.untrusted import convert, parse_json

OUTCOME_FILE = "WINDLASS_OUTCOME_FILE"
STOP_FILE = "WINDLASS_STOP_FILE"
"""Environment variables with the files' paths; unset where no launcher of ours listens."""
LAUNCHER = -1
"""In place of a rank: a launcher has decided it."""


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    message: str | None = None
    """The words that the user must be told and rank 0 may not have said."""
    rank: int = 0
    """Or `LAUNCHER`."""
    has_begun: bool = True
    """False for a worker that was asked to stop before it had met the others."""

    @property
    def is_common(self) -> bool:
        """True if all ranks come to it at the same step; after any other one, ranks wait for each other in vain."""
        return self.has_begun and self.exit_code in (EXIT_DONE, EXIT_STOPPED)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Outcome:
        """Raises Malformed: it may have come from another node."""
        return convert(parse_json(text), Outcome)


def report_outcome(exit_code: int, message: str | None = None, *, has_begun: bool = True) -> int:
    """Leaves an outcome for the launcher; returns the code to exit with: 0 if it listens.

    The first one stays.
    """
    path = os.environ.get(OUTCOME_FILE)
    if path is None:
        return exit_code
    rank = int(os.environ.get("RANK") or "0")
    if reported_outcome() is None:
        temporary = Path(f"{path}.{os.getpid()}")
        temporary.write_text(Outcome(exit_code, message, rank, has_begun).to_json(), encoding="utf-8")
        temporary.replace(path)
    return 0


def reported_outcome() -> Outcome | None:
    """Reads the outcome that a worker of this job has left, if any has."""
    path = os.environ.get(OUTCOME_FILE)
    if path is None or not Path(path).exists():
        return None
    return Outcome.from_json(Path(path).read_text(encoding="utf-8"))


def write_request(stop_file: Path, signal_name: str | None) -> None:
    """For workers that are not there yet, and what SIGUSR1 asks of those that are.

    Args:
        signal_name: what the launcher was asked to stop by; None: its node leaves the job.
    """
    temporary = stop_file.with_name(f"{stop_file.name}.new")
    temporary.write_text(signal_name or "", encoding="utf-8")
    temporary.replace(stop_file)


def stop_requested() -> bool:
    """True if the launcher was asked to stop, or to leave, before this worker could hear it."""
    path = os.environ.get(STOP_FILE)
    return path is not None and Path(path).exists()


def stop_of_launcher() -> str | None:
    """The signal by which the launcher was asked to stop the job; None if it was not."""
    path = os.environ.get(STOP_FILE)
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8") or None
    except OSError:
        return None
