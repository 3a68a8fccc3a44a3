"""The state of torch's rendezvous as JSON: all of it goes there and back, and nothing else is taken for one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from torch.distributed import HashStore, PrefixStore
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousStateError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
    _NodeDesc,
    _RendezvousState,
)

from windlass.launch import rendezvous_state
from windlass.launch.job_store import StoreClient, StoreServer
from windlass.launch.rendezvous_state import KEY, JsonBackend, from_text, to_text
from windlass.launch.torch_store import JobStore

NODES = [_NodeDesc("10.0.0.2", 7, 0), _NodeDesc("10.0.0.1", 9, 1), _NodeDesc("10.0.0.3", 2, 0)]
NOW = datetime(2025, 1, 2, 3, 4, 5, 678901, UTC)


def full() -> _RendezvousState:
    state = _RendezvousState()
    state.round, state.complete, state.closed, state.deadline = 3, True, True, NOW + timedelta(microseconds=1)
    state.participants = {NODES[0]: 1, NODES[1]: 0}
    state.wait_list, state.redundancy_list = {NODES[2]}, {NODES[1], NODES[2]}
    state.last_heartbeats = dict.fromkeys(NODES, NOW)
    return state


@pytest.mark.parametrize("state", [_RendezvousState(), full()], ids=["new", "full"])
def test_all_of_a_state_goes_there_and_back(state: _RendezvousState) -> None:
    assert vars(from_text(to_text(state).encode())) == vars(state)
    assert vars(state).keys() == set(rendezvous_state.State.__dataclass_fields__)


def test_two_nodes_do_not_overwrite_each_other() -> None:
    store = HashStore()
    one, other = JsonBackend(store), JsonBackend(store)
    assert one.get_state() is None
    first, token, is_mine = one.set_state(pickle.dumps(_RendezvousState()))
    assert is_mine and vars(pickle.loads(first)) == vars(_RendezvousState())
    late, newer, is_mine = other.set_state(pickle.dumps(full()))  # it has read nothing
    assert not is_mine and newer == token and vars(pickle.loads(late)) == vars(_RendezvousState())
    assert other.set_state(pickle.dumps(full()), newer)[2]
    found = one.get_state()
    assert found is not None and vars(pickle.loads(found[0])) == vars(full())


class Trap:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return pytest.fail, ("a pickle of a stranger ran",)


def variants() -> Iterator[bytes]:
    good = json.loads(to_text(full()))
    yield from (pickle.dumps(Trap()), b"", b"[]", b"null", b"\xff", b'{"round": 1}', b"[" * 100_000)
    for key, value in (
        ("round", "1"),
        ("round", 10**30),
        ("deadline", "tomorrow"),
        ("deadline", "2025-01-02T03:04:05"),
        ("participants", [[1]]),
        ("last_heartbeats", [{"node": good["wait_list"][0], "time": 5}]),
        ("wait_list", [{"addr": "a", "pid": 1}]),
        ("more", 1),
    ):
        yield json.dumps({**good, key: value}).encode()


@pytest.mark.parametrize("number", range(len(list(variants()))))
def test_what_is_no_state_is_refused(number: int) -> None:
    text = list(variants())[number]
    with pytest.raises(RendezvousStateError, match="no state of a rendezvous"):
        from_text(text)
    store = HashStore()
    store.set(KEY, "x")
    with pytest.raises(RendezvousStateError):
        JsonBackend(store).get_state()


def test_a_lost_store_is_the_rendezvous_error_of_torch() -> None:
    server = StoreServer("127.0.0.1", bytes(32))
    store = JobStore(StoreClient(("127.0.0.1", server.port), bytes(32)), timedelta(seconds=1))
    backend = JsonBackend(PrefixStore("job", store))
    assert backend.set_state(pickle.dumps(full()))[2]
    server.close()
    with pytest.raises(RendezvousConnectionError, match="the job's store"):
        backend.get_state()


@pytest.mark.slow
def test_torchs_handler_meets_with_itself_over_it() -> None:
    store = HashStore()
    handler = DynamicRendezvousHandler.from_backend(
        "job", store, JsonBackend(store), 1, 1, "127.0.0.1", RendezvousTimeout(), 1, 3
    )
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size) == (0, 1)
    assert json.loads(store.get(KEY))["participants"][0]["node"]["addr"] == "127.0.0.1"
    assert handler.shutdown() and handler.is_closed()
