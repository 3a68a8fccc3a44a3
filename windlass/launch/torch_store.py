"""Gives the job store to torch as one of its stores, for process groups."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, Store

from windlass.checkpoint.net.handshake import TransportError
from windlass.launch.job_store import STORE, STORE_SECRET, StoreClient

_FIRST_POLL_S, _LONGEST_POLL_S = 0.001, 0.05


class JobStore(Store):
    """All methods raise DistNetworkError once the store is lost; what waits raises DistStoreError in the end.

    torch's C++ calls it, and does not keep it: whoever gives it to torch holds it as long as torch does.

    Args:
        timeout: how long what waits for a key does so.
    """

    def __init__(self, client: StoreClient, timeout: timedelta) -> None:
        super().__init__()
        self.set_timeout(timeout)  # for who asks torch
        self._client, self._timeout = client, timeout
        self._clones: list[JobStore] = []  # torch asks for some, too

    def clone(self) -> JobStore:
        """Another connection, held as long as this one is."""
        with _torchs_errors():
            self._clones.append(JobStore(StoreClient(self._client.address, self._client.secret), self._timeout))
        return self._clones[-1]

    def set(self, key: str, value: str | bytes) -> None:
        with _torchs_errors():
            self._client.set({key: _bytes(value)})

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.wait(keys)
        with _torchs_errors():
            return [value or b"" for value in self._client.get(keys)]

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        with _torchs_errors():
            self._client.set({key: _bytes(value) for key, value in zip(keys, values, strict=True)})

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        with _torchs_errors():
            return self._client.compare_set(key, _bytes(expected_value), _bytes(desired_value))

    def add(self, key: str, value: int) -> int:
        with _torchs_errors():
            return self._client.add(key, value)

    def append(self, key: str, value: str | bytes) -> None:
        with _torchs_errors():
            self._client.append(key, _bytes(value))

    def delete_key(self, key: str) -> bool:
        with _torchs_errors():
            return self._client.delete(key)

    deleteKey = delete_key  # as torch's C++ calls it

    def check(self, keys: Sequence[str]) -> bool:
        with _torchs_errors():
            return None not in self._client.get(keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        seconds, begin, pause_s = (timeout or self._timeout).total_seconds(), time.monotonic(), _FIRST_POLL_S
        while not self.check(keys):
            if time.monotonic() > begin + seconds:
                raise DistStoreError(f"no other process has set {', '.join(keys)} within {seconds:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def has_extended_api(self) -> bool:
        return True


def take_store_variables() -> Callable[[float], Store] | None:
    """Returns what connects with the store of this worker's launcher, given a timeout in seconds; None: it serves none.

    The environment forgets of it: a worker's own children are not to know. What is returned raises DistNetworkError if
    the store is lost, or does not let this worker in.
    """
    address, secret = os.environ.pop(STORE, None), os.environ.pop(STORE_SECRET, None)
    if address is None or secret is None:
        return None
    host, _, port = address.rpartition(":")

    def connect(timeout_s: float) -> Store:
        with _torchs_errors():
            client = StoreClient((host, int(port)), bytes.fromhex(secret))
        return JobStore(client, timedelta(seconds=timeout_s))

    return connect


@contextmanager
def _torchs_errors() -> Iterator[None]:
    try:
        yield
    except TransportError as error:
        raise DistNetworkError(f"the job's store: {error}") from error


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
