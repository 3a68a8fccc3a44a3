"""What launchers tell each other, over a store in this process, and where they find it, over sockets."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import psutil
import pytest
from support.ranks import free_port
from torch.distributed import HashStore, PrefixStore

from windlass.conf.compose import compose
from windlass.errors import ConfigError
from windlass.launch import meeting_place
from windlass.launch.interfaces import everywhere, listen_address
from windlass.launch.job_store import StoreServer
from windlass.launch.meeting import Meeting, card_of, disagreement, job_name
from windlass.launch.meeting_place import ANSWER_S, Place, open_place
from windlass.outcome import Outcome
from windlass.parallel.mesh import _store_of_this_attempt

PLACE = Place("127.0.0.1", 1, "127.0.0.1", is_host=False)
SECRET = b"the secret of one job, 32 bytes."
CARD = {"node": "a", "windlass": "1", "torch": "2.13.0", "python": "3.11.2", "train.steps": "5"}


def test_the_first_outcome_is_the_jobs() -> None:
    meeting = Meeting(HashStore(), PLACE)
    assert meeting.ended() is None
    assert meeting.publish(Outcome(2, "first", 3)) == Outcome(2, "first", 3)
    assert meeting.publish(Outcome(0)) == Outcome(2, "first", 3)
    assert meeting.ended() == Outcome(2, "first", 3)


def test_a_life_has_one_number_on_all_its_nodes_and_another_the_next_time() -> None:
    store = HashStore()
    with ThreadPoolExecutor(4) as nodes:
        for life in range(3):
            round_store = PrefixStore(str(life), store)
            numbers = nodes.map(lambda rank, r=round_store: Meeting(store, PLACE).begin_life(r, rank, 4, 2), range(4))
            assert list(numbers) == [life] * 4


def test_a_life_does_not_begin_without_all_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windlass.launch.meeting.ANSWER_S", 0.1)
    assert Meeting(HashStore(), PLACE).begin_life(HashStore(), 0, 2, 2) is None


@pytest.mark.parametrize(
    "members",
    [
        [(0, 3), (1, 3), (2, 2)],  # rank 2 asked who is in after one was given up, the others before
        [(0, 2), (2, 2)],  # rank 1 was given up before any asked
        [(0, 1)],  # likewise, and rank 0 is not enough
    ],
)
def test_a_life_does_not_begin_with_nodes_that_differ_in_who_is_there(members: list[tuple[int, int]]) -> None:
    store, round_store = HashStore(), HashStore()
    begin = time.monotonic()
    with ThreadPoolExecutor(len(members)) as nodes:
        lives = nodes.map(lambda member: Meeting(store, PLACE).begin_life(round_store, *member, 2), members)
        assert list(lives) == [None] * len(members)
    assert time.monotonic() - begin < ANSWER_S / 2, "they do not wait for those that will not come"


def test_deaths_are_counted_by_lives_and_not_by_nodes() -> None:
    meeting = Meeting(HashStore(), PLACE)
    assert [meeting.count_death(life) for life in (0, 0, 3, 3, 3, 4)] == [1, 1, 2, 2, 2, 3]
    meeting.end_life(7)
    assert meeting.is_over(0) and meeting.is_over(7) and not meeting.is_over(1)
    assert meeting.has_death(4) and not meeting.has_death(7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch": "2.12.0"}, "torch=2.12.0: on node b, and node a has 2.13.0. Fix: install the same torch"),
        ({"python": "3.12.1"}, "python=3.12.1: on node b, and node a has 3.11.2"),
        ({"train.steps": "6"}, "train.steps=6: on node b, and node a has 5. Fix: start all nodes with the same"),
        ({"train.step_s": "1", "windlass": "2"}, "windlass=2: on node b"),  # what explains the other comes first
        ({"train.step_s": "1"}, "train.step_s=1: on node b, and node a has missing"),
    ],
)
def test_nodes_that_differ_are_told_in_what(change: dict[str, str], says: str) -> None:
    error = disagreement({**CARD, "node": "b", **change}, CARD)
    assert error is not None and says in str(error)


def test_a_node_that_differs_ends_a_job_that_has_not_begun_and_none_that_has() -> None:
    for has_begun in (False, True):
        meeting = Meeting(HashStore(), PLACE)
        meeting.join(CARD)
        if has_begun:
            assert meeting.begin_life(HashStore(), 0, 1, 1) == 0
        with pytest.raises(ConfigError, match=r"train\.steps=6"):
            meeting.join({**CARD, "node": "b", "train.steps": "6"})
        outcome = meeting.ended()
        assert (outcome is None) is has_begun
        assert outcome is None or (outcome.exit_code == 2 and "train.steps=6: on node b" in (outcome.message or ""))


@pytest.mark.slow
def test_what_is_a_nodes_own_may_differ() -> None:
    base = ["launch=torchrun", "checkpoint=erasure"]
    first = card_of(compose(base), 2)
    own = compose([*base, "checkpoint.shm_dir=/dev/shm/a", "checkpoint.agent_host=10.0.0.1", "data.cache_dir=/b"])
    assert disagreement(card_of(own, 2), first) is None
    ranks = disagreement(card_of(compose(base), 3), first)
    assert ranks is not None and "launch.nproc_per_node=3: on node" in str(ranks)
    numbered = compose([*base, "launch.node_rank=0"])
    assert "launch.node_rank=a number" in str(disagreement(card_of(numbered, 2), first))


@pytest.mark.slow
def test_a_jobs_name_is_its_folders() -> None:
    names = {job_name(compose(overrides)) for overrides in (["run_dir=a"], ["run_dir=b"], ["checkpoint.dir=c"])}
    assert len(names) == 3
    assert job_name(compose(["run_dir=a", "train.steps=9"])) in names


def test_the_host_waits_until_the_others_have_signed_off() -> None:
    store = HashStore()
    host = Meeting(store, Place("127.0.0.1", 1, "127.0.0.1", is_host=True))
    other = Meeting(store, PLACE)
    host.join(CARD)
    other.join(CARD)
    has_left: list[bool] = []
    thread = threading.Thread(target=lambda: has_left.append(host.sign_off() is None))
    thread.start()
    time.sleep(0.1)
    assert not has_left
    other.sign_off()
    thread.join(timeout=3)
    assert has_left == [True]


# --- Where they meet. ---


def test_the_first_on_the_host_serves_and_the_next_find_it() -> None:
    address = f"127.0.0.1:{free_port()}"
    store, place = open_place(address, 5, SECRET)
    assert (place.is_host, place.local_address) == (True, "127.0.0.1")
    other, other_place = open_place(address, 5, SECRET)
    assert not other_place.is_host
    store.set("key", "value")
    assert other.get("key") == b"value"
    assert place.connect().get("key") == b"value"


def test_the_port_is_free_again_when_the_store_is_closed() -> None:
    address = f"127.0.0.1:{free_port()}"
    store, place = open_place(address, 5, SECRET)
    store.set("key", "value")
    place.close()
    again, place = open_place(address, 5, SECRET)
    assert place.is_host and not again.check(["key"])


def listening_on(port: int) -> set[str]:
    """The addresses at which this process listens."""
    connections = psutil.Process().net_connections("tcp")
    return {own.laddr.ip for own in connections if own.status == psutil.CONN_LISTEN and own.laddr.port == port}


def test_a_node_that_is_alone_needs_no_address_and_is_reached_by_no_other() -> None:
    _, place = open_place("auto", 5, SECRET)
    assert place.is_host and listening_on(place.port) == {"127.0.0.1"}
    assert place.interface == "lo" or sys.platform != "linux"


@pytest.mark.parametrize(
    ("host", "resolved", "expected"),
    [
        ("node0", "10.0.0.1", "10.0.0.1"),  # no other interface
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "::1"),
        ("node0", "127.0.1.1", everywhere()),  # Debian's name of the machine itself, which others know otherwise
    ],
)
def test_a_store_listens_where_others_look_for_it(host: str, resolved: str, expected: str) -> None:
    assert listen_address(host, resolved) == expected


def test_the_first_node_may_know_its_own_name_as_loopback() -> None:
    server = StoreServer(listen_address("node0", "127.0.1.1"), SECRET)
    try:
        for host in ("127.0.1.1", "127.0.0.1"):
            Place(host, server.port, host, is_host=True, secret=SECRET).connect().set("a", "1")
    finally:
        server.close()


def test_a_node_with_another_secret_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_place, "ANSWER_S", 0.0)
    address = f"127.0.0.1:{free_port()}"
    open_place(address, 5, SECRET)
    with pytest.raises(
        ConfigError, match=rf"launch\.secret_file=\(hidden\): the launcher at launch.address={address} has"
    ):
        open_place(address, 5, b"another secret of another job")


def test_the_jobs_at_one_address_share_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store = HashStore()
    for job in ("one", "other"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        own = _store_of_this_attempt(0, 2, timedelta(seconds=1), store)["store"]
        assert own.compare_set("rank 0", "", job) == job.encode()


def test_an_unknown_name_is_said_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_place, "SAY_AFTER_S", 0.0)
    with pytest.raises(ConfigError, match=r"launch\.address=nowhere\.invalid:29400: does not answer .*name is unknown"):
        open_place("nowhere.invalid:29400", 0.1, SECRET)
    assert "does not answer yet" in capsys.readouterr().err


def test_an_address_that_nobody_answers_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_place, "is_own", lambda _: False)
    with pytest.raises(ConfigError, match=r"does not answer after 0\.1 s: Connection refused"):
        open_place(f"127.0.0.1:{free_port()}", 0.1, SECRET)


@contextmanager
def listener() -> Iterator[int]:
    """Takes connections, and says nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_port_that_something_else_has_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_place, "ANSWER_S", 0.0)
    monkeypatch.setattr(meeting_place, "HANDSHAKE_S", 0.2)
    with listener() as port, pytest.raises(ConfigError, match="something else than a launcher of windlass uses"):
        open_place(f"127.0.0.1:{port}", 5, SECRET)
