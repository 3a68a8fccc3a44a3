"""Finds `launch.address`, where the launchers of a job's nodes meet: a key-value store that one of them serves.

The launcher that runs on HOST serves the store, or the first of several there. The others try until it answers, as
nodes of a batch job start minutes apart, and names of containers are known only once they run. What is no store, and
what never answers, is said so.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from torch.distributed import DistError, TCPStore

from windlass.errors import ConfigError

ANSWER_S = 10.0
"""How long the store, or a node that has just been there, may take to answer."""
CUT_S = 10.0
"""How long the system keeps trying to deliver something to it. Linux would, by itself, for 15 minutes."""
PROBE_S = 2.0
RETRY_S = 0.3
SAY_AFTER_S = 3.0
NOWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): which way there is, is the way to other machines."""


@dataclass(frozen=True)
class Place:
    """Args:
    host: the name by which all nodes know the one that serves the store.
    local_address: of this node, as the others reach it.
    """

    host: str
    port: int
    local_address: str
    is_host: bool

    def connect(self) -> TCPStore:
        """Another connection with the store. It breaks when the network is cut, `CUT_S` after something was sent."""
        store = TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=ANSWER_S))
        _break_when_cut(self.port)
        return store

    @property
    def interface(self) -> str | None:
        """The network interface of `local_address`."""
        for name, addresses in psutil.net_if_addrs().items():
            if any(address.address.partition("%")[0] == self.local_address for address in addresses):
                return name
        return None


def open_place(address: str, timeout_s: float) -> tuple[TCPStore, Place]:
    """Serves the store, or finds it.

    Args:
        address: HOST:PORT, or `auto` for a node that is alone.
        timeout_s: how long to try.

    Raises:
        ConfigError: nothing answers there, or something else does.
    """
    if address == "auto":
        store = _serve("127.0.0.1", 0)
        return store, Place("127.0.0.1", store.port, "127.0.0.1", True)
    host, _, port_text = address.rpartition(":")
    host, port = host.strip("[]"), int(port_text)
    begin = time.monotonic()
    has_said = False
    while True:
        found = _try(host, port)
        if not isinstance(found, str):
            return found
        waited = time.monotonic() - begin
        if waited > timeout_s:
            raise ConfigError(
                "launch.address",
                address,
                f"does not answer after {timeout_s:g} s: {found}",
                "name a node of the job and a port that is free there and open to the others, "
                "and start windlass on that node too",
            )
        if waited > SAY_AFTER_S and not has_said:
            sys.stderr.write(f"windlass: launch.address={address} does not answer yet ({found}): trying on\n")
            has_said = True
        time.sleep(RETRY_S)


def _try(host: str, port: int) -> tuple[TCPStore, Place] | str:
    """The store, or why there is none yet."""
    try:
        resolved = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        return f"the name is unknown ({error.strerror})"
    is_here = _is_own(resolved)
    local_address = _own_address(host, resolved, is_here)
    if is_here:
        with suppress(DistError):  # another launcher on this machine serves it, or something else has the port
            return _serve(host, port), Place(host, port, local_address, True)
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except OSError as error:
        return str(error.strerror or error)
    place = Place(host, port, local_address, False)
    return _connect(place), place


def _serve(host: str, port: int) -> TCPStore:
    timeout = timedelta(seconds=ANSWER_S)
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout)


def _connect(place: Place) -> TCPStore:
    """Raises ConfigError if what answers is no store: torch would wait for its answer without end."""
    stores: list[TCPStore] = []

    def connect() -> None:
        with suppress(DistError):
            stores.append(place.connect())

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not stores:
        raise ConfigError(
            "launch.address",
            f"{place.host}:{place.port}",
            "something else than a launcher of windlass uses this port",
            "choose a port that is free on that node",
        )
    return stores[0]


def _break_when_cut(port: int) -> None:
    """For this process's connections with `port`, of whose sockets torch gives no sight. Linux only."""
    if sys.platform != "linux":
        return
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or not connected
            if entry.is_socket():
                with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                    is_tcp = connection.family != socket.AF_UNIX and connection.type == socket.SOCK_STREAM
                    if is_tcp and connection.getpeername()[1] == port:
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * CUT_S))
                        # Of one that waits for an answer, with nothing left to deliver:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(CUT_S / 2))
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)


def _is_own(address: str) -> bool:
    """Whether an address is one of this machine's: no other can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _own_address(host: str, resolved: str, is_here: bool) -> str:
    """How other nodes reach this one. A machine often knows its own name as a loopback address, which no other does."""
    if is_here and not ipaddress.ip_address(resolved).is_loopback:
        return resolved
    if is_here and (host == "localhost" or host == resolved):
        return resolved
    target = NOWHERE if is_here else resolved
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # sends nothing: it only chooses a route
        except OSError:
            return resolved
        return probe.getsockname()[0]
