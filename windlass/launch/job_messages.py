"""Carries what the launchers of one job tell each other, on the job store that one of them serves.

Each node writes a report of itself, and the launcher that serves the store, which runs the job, writes what all are to
do. An outcome ends the job on all nodes, whoever writes it. All lies there as JSON, and is checked when it is read.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from enum import StrEnum

from windlass.errors import EXIT_USER_ERROR
from windlass.launch.fingerprint import difference
from windlass.launch.job_store import StoreClient
from windlass.launch.policy import WorkerEnd
from windlass.outcome import LAUNCHER, Outcome
from windlass.untrusted import convert, parse_json

SIGN_OFF_S = 8.0
"""How long the node that serves the store waits for others to have read the outcome, and ended their workers: while one
is left that waits for a rank, it would take the end of the store for a failure of its own. Not for longer, as launchers
that were lost are waited for in vain."""

_POLL_S = 0.02


class JobEnded(Exception):
    """Raised when the job is over for this node.

    Args:
        is_own: this node has said so, and not another one.
    """

    def __init__(self, outcome: Outcome, is_own: bool) -> None:
        super().__init__(outcome, is_own)
        self.outcome, self.is_own = outcome, is_own


@dataclass(frozen=True)
class NodeReport:
    address: str
    pid: int
    """The launcher's; with the address it puts nodes in an order."""
    node_rank: int | None = None
    """`launch.node_rank`."""
    attempt: int = -1
    """The newest that this node has had a part in."""
    ends: tuple[WorkerEnd, ...] = ()
    """Its workers of that attempt that have ended."""
    is_ready: bool = False
    """It has no workers, and waits for the next attempt."""
    is_stopping: bool = False
    """Its launcher was asked to stop the job."""
    is_leaving: bool = False
    """It is to have no part in another attempt."""


class Phase(StrEnum):
    run = "run"
    save = "save"
    """Workers are to save and end."""
    kill = "kill"
    """Workers are to end at once."""
    over = "over"
    """All workers have ended, and the job goes on with another attempt."""


@dataclass(frozen=True)
class Command:
    attempt: int
    nodes: tuple[str, ...]
    """In the order of their ranks."""
    phase: Phase = Phase.run


class JobMessages:
    """Any thread may call any method.

    Args:
        job: its name on the store.
    """

    def __init__(self, client: StoreClient, job: str) -> None:
        self._client, self.job = client, job
        self._has_joined = False
        self._read: dict[str, tuple[bytes, NodeReport]] = {}

    def _key(self, name: str) -> str:
        return f"windlass/{self.job}/{name}"

    def _get(self, names: list[str]) -> list[bytes | None]:
        return self._client.get([self._key(name) for name in names])

    # --- The job. ---

    def join(self, fingerprint: dict[str, str]) -> str:
        """Compares this node with the first that came, and returns its ID. A node that differs ends a job that has not
        begun to train.

        Raises:
            ConfigError: it differs; the message names what, and both nodes.
        """
        first = self._client.compare_set(self._key("fingerprint"), b"", json.dumps(fingerprint).encode())
        error = difference(fingerprint, convert(parse_json(first), dict[str, str]))
        if error is not None:
            if self.command() is None:
                self.publish(Outcome(EXIT_USER_ERROR, str(error), LAUNCHER))
            raise error
        node = str(self._client.add(self._key("num_nodes"), 1) - 1)
        self._has_joined = True
        return node

    def publish(self, outcome: Outcome) -> Outcome:
        """Ends the job on all nodes. Returns the outcome that came first."""
        return Outcome.from_json(self._client.compare_set(self._key("outcome"), b"", outcome.to_json().encode()))

    def ended(self) -> Outcome | None:
        """Returns the outcome that some node has published."""
        return self.told()[0]

    def sign_off(self, serves_store: bool) -> None:
        """This node needs the store no more; where it serves it, waits a while for those that still do."""
        num_left = self._client.add(self._key("num_signed_off"), int(self._has_joined))
        deadline = time.monotonic() + SIGN_OFF_S
        while serves_store and num_left < self.num_nodes() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            num_left = self._client.add(self._key("num_signed_off"), 0)

    # --- What each node says of itself. ---

    def report(self, node: str, report: NodeReport) -> None:
        self._client.set({self._key(f"report/{node}"): json.dumps(asdict(report)).encode()})

    def beat(self, node: str) -> None:
        """Gives a sign of life."""
        self._client.add(self._key(f"beat/{node}"), 1)

    def num_nodes(self) -> int:
        """Counts all nodes that have joined, lost ones, too."""
        return self._client.add(self._key("num_nodes"), 0)

    def reports(self) -> dict[str, tuple[NodeReport, bytes | None]]:
        """Returns the reports of all nodes, by ID, in the order in which they came, and how often each gave a sign of
        life."""
        nodes = [str(number) for number in range(self.num_nodes())]
        texts = self._get([f"{kind}/{node}" for kind in ("report", "beat") for node in nodes])
        pairs = zip(nodes, texts[: len(nodes)], texts[len(nodes) :], strict=True)
        found = {}
        for node, text, beat in pairs:
            if text is not None:
                before = self._read.get(node)
                if before is None or before[0] != text:  # reports of many nodes seldom change
                    before = self._read[node] = text, convert(parse_json(text), NodeReport)
                found[node] = before[1], beat
        return found

    # --- What all are to do. ---

    def give(self, command: Command) -> None:
        self._client.set({self._key("command"): json.dumps(asdict(command)).encode()})

    def command(self) -> Command | None:
        return self.told()[1]

    def told(self) -> tuple[Outcome | None, Command | None]:
        """Returns the job's outcome, if it has one, and the newest command."""
        outcome, command = self._get(["outcome", "command"])
        return (
            None if outcome is None else Outcome.from_json(outcome),
            None if command is None else convert(parse_json(command), Command),
        )
