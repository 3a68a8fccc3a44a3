"""What the launchers of one job's nodes tell each other, on a key-value store that one of them serves.

An outcome that one node's worker has left ends the job on all nodes. A life gets its number here, alike on all nodes,
and is declared over here when a node's workers end it, so that nobody waits for ranks that are gone. A node that would
disagree with the others, by its versions or its configuration, is refused before it trains.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time

from torch.distributed import Store

from windlass.conf.dotted_keys import flatten
from windlass.conf.schema import Config
from windlass.conf.store import to_plain
from windlass.errors import EXIT_USER_ERROR, ConfigError
from windlass.launch.meeting_place import ANSWER_S, Place
from windlass.launch.versions import VERSIONS, versions
from windlass.outcome import LAUNCHER, Outcome
from windlass.untrusted import convert, parse_json

SIGN_OFF_S = 8.0
"""How long the node that serves the store waits for others to have read the outcome, and ended their workers: while one
is left that waits for a rank, it would take the end of the store for a failure of its own. So it is above
`windlass.launch.elastic_agent.DYING_S`; not far, as launchers that were lost are waited for in vain."""
OWN_KEYS = frozenset(
    {
        "checkpoint.agent_host",
        "checkpoint.shm_dir",
        "data.cache_dir",
        "data.num_workers",
        "launch.node_rank",
        "launch.secret_file",
        "metrics.console",
        "offload.dir",
        "offload.max_host_bytes",
    }
)
"""What may differ between nodes."""

_POLL_S = 0.02


class JobEnded(Exception):
    """The job is over for this node.

    Args:
        is_own: whether a worker of this node, or its launcher, has said so, and not another node.
    """

    def __init__(self, outcome: Outcome, is_own: bool) -> None:
        super().__init__(outcome, is_own)
        self.outcome, self.is_own = outcome, is_own


class Meeting:
    """Args:
    store: of this job alone.
    """

    def __init__(self, store: Store, place: Place) -> None:
        self._store, self.place = store, place

    # --- The job. ---

    def join(self, card: dict[str, str]) -> None:
        """Compares this node with the first that came. A node that differs ends a job that has not begun to train.

        Raises:
            ConfigError: it differs; the message names what, and both nodes.
        """
        first = convert(parse_json(self._store.compare_set("card", "", json.dumps(card))), dict[str, str])
        error = disagreement(card, first)
        if error is not None:
            if not self._store.check(["lives"]):
                self.publish(Outcome(EXIT_USER_ERROR, str(error), LAUNCHER))
            raise error
        self._store.add("launchers", 1)

    def publish(self, outcome: Outcome) -> Outcome:
        """Ends the job on all nodes. Returns the outcome that came first."""
        return Outcome.from_json(self._store.compare_set("outcome", "", outcome.to_json()))

    def ended(self) -> Outcome | None:
        """What some node has published."""
        return Outcome.from_json(self._store.get("outcome")) if self._store.check(["outcome"]) else None

    def sign_off(self) -> None:
        """This node needs the store no more; where it serves it, waits a while for those that still do."""
        num_left = self._store.add("signed_off", 1)
        deadline = time.monotonic() + SIGN_OFF_S
        while self.place.is_host and num_left < self._store.add("launchers", 0) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            num_left = self._store.add("signed_off", 0)

    # --- Lives. ---

    def begin_life(self, round_store: Store, rank: int, num_nodes: int, min_nodes: int) -> int | None:
        """The number of the next life, once all nodes of a rendezvous are here.

        None: they are to meet again. One of them does not come, or torch gave one up just when they had met: then its
        rank is missing among theirs, or they differ in how many they are.

        Args:
            round_store: of this rendezvous alone.
            rank: of this node among `num_nodes`.
        """
        size = str(num_nodes)
        if not (rank < num_nodes >= min_nodes and round_store.compare_set("windlass/size", "", size).decode() == size):
            round_store.set("windlass/void", "")
            return None
        num_here = round_store.add("windlass/here", 1)
        if num_here == 1:
            round_store.set("windlass/life", str(self._store.add("lives", 1) - 1))
        deadline = time.monotonic() + ANSWER_S
        while num_here < num_nodes or not round_store.check(["windlass/life"]):
            if time.monotonic() > deadline or round_store.check(["windlass/void"]):
                return None
            time.sleep(_POLL_S)
            num_here = round_store.add("windlass/here", 0)
        return int(round_store.get("windlass/life"))

    def end_life(self, life: int) -> None:
        """Workers of a node have ended a life, for others to end theirs after what they are saving."""
        self._store.set(f"over/{life}", "")

    def count_death(self, life: int) -> int:
        """A worker died, so the life is over, and there is nothing to wait for. Returns how many lives ended so."""
        if self._store.add(f"deaths/{life}", 1) == 1:
            self._store.add("dead_lives", 1)
        self.end_life(life)
        return self._store.add("dead_lives", 0)

    def is_over(self, life: int) -> bool:
        return self._store.check([f"over/{life}"])

    def has_death(self, life: int) -> bool:
        return self._store.check([f"deaths/{life}"])


def card_of(config: Config, num_local_ranks: int) -> dict[str, str]:
    """What must be alike on all nodes, and this node's name."""
    plain = {key: str(value) for key, value in flatten(to_plain(config)).items() if key not in OWN_KEYS}
    return {
        **plain,
        "launch.nproc_per_node": str(num_local_ranks),
        "launch.node_rank": "null" if config.launch.node_rank is None else "a number",
        **versions(),
        "node": socket.gethostname(),
    }


def disagreement(card: dict[str, str], first: dict[str, str]) -> ConfigError | None:
    """What keeps two nodes from being in one job."""
    for key in (*VERSIONS, *sorted((card.keys() | first.keys()) - {*VERSIONS, "node"})):
        mine, theirs = card.get(key, "missing"), first.get(key, "missing")
        if mine != theirs:
            where = f"on node {card['node']}, and node {first['node']}"
            if key in VERSIONS:
                return ConfigError(key, mine, f"{where} has {theirs}", f"install the same {key} on all nodes")
            return ConfigError(key, mine, f"{where} has {theirs}", "start all nodes with the same overrides")
    return None


def job_name(config: Config) -> str:
    """Alike on all nodes, in every start of the job, and for no other job."""
    return hashlib.sha256(f"{config.run_dir}\n{config.checkpoint.dir}".encode()).hexdigest()[:16]
