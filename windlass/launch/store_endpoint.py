"""Serves the job store at `launch.address`, where the launchers of a job's nodes meet, or finds it there.

The launcher that runs on HOST serves the store, or the first of several there. The others try until it answers, as
nodes of a batch job start minutes apart, and names of containers are known only once they run. What is no store, whose
secret is another, and what never answers, is said so. The store of a job that is alone is for this machine only.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
from dataclasses import dataclass, field

from windlass.checkpoint.net.handshake import HANDSHAKE_S, OtherSecret, RefusedPeer, TransportError
from windlass.errors import ConfigError
from windlass.launch.interfaces import LOOPBACK, interface_of, is_own, listen_address, own_address
from windlass.launch.job_store import StoreClient, StoreServer
from windlass.launch.secret import SECRET

ANSWER_S = 10.0
"""How long somebody at the address may refuse this launcher before it gives up."""
RETRY_S = 0.3
SAY_AFTER_S = 3.0


@dataclass(frozen=True)
class StoreEndpoint:
    """Args:
    host: the name by which all nodes know the one that serves the store.
    local_address: this node's, as the others reach it.
    is_host: this node serves the store.
    """

    host: str
    port: int
    local_address: str
    is_host: bool
    secret: bytes = field(default=b"", repr=False)
    server: StoreServer | None = field(default=None, repr=False, compare=False)
    """On the node that serves the store."""

    def connect(self) -> StoreClient:
        """Makes another connection with the store. It breaks when the network is cut.

        Raises:
            TransportError: the store is not there, or does not let this process in.
        """
        return StoreClient((self.host, self.port), self.secret)

    def close(self) -> None:
        """Ends the store, if this node serves it."""
        if self.server is not None:
            self.server.close()

    @property
    def interface(self) -> str | None:
        """The name of the network interface that has `local_address`."""
        return interface_of(self.local_address)


def open_endpoint(address: str, timeout_s: float, secret: bytes) -> tuple[StoreClient, StoreEndpoint]:
    """Serves the store, or finds it.

    Args:
        address: HOST:PORT, or `auto` for a node that is alone.
        timeout_s: how long to try.
        secret: of the job.

    Raises:
        ConfigError: nothing answers there, or something else does.
    """
    if address == "auto":
        return _serve(LOOPBACK, LOOPBACK, 0, LOOPBACK, secret)
    host, _, port_text = address.rpartition(":")
    host, port = host.strip("[]"), int(port_text)
    begin = time.monotonic()
    refused_since: float | None = None
    has_said = False
    while True:
        found = _try(host, port, secret)
        if not isinstance(found, Exception):
            return found
        now = time.monotonic()
        refused_since = (refused_since or now) if isinstance(found, RefusedPeer) else None
        if refused_since is not None and now > refused_since + ANSWER_S:
            raise _not_ours(address, found)
        waited = now - begin
        if waited > timeout_s:
            raise ConfigError(
                "launch.address",
                address,
                f"does not answer after {timeout_s:g} s: {_reason(found)}",
                "name a node of the job and a port that is free there and open to the others, "
                "and start windlass on that node too",
            )
        if waited > SAY_AFTER_S and not has_said:
            sys.stderr.write(f"windlass: launch.address={address} does not answer yet ({_reason(found)}): trying on\n")
            has_said = True
        time.sleep(RETRY_S)


def _try(host: str, port: int, secret: bytes) -> tuple[StoreClient, StoreEndpoint] | OSError:
    """Serves the store or connects with it. Returns why there is none yet, if that is so."""
    try:
        resolved = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        return error
    is_here = is_own(resolved)
    local_address = own_address(host, resolved, is_here)
    if is_here:
        try:
            return _serve(host, listen_address(host, resolved), port, local_address, secret)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return error
            # Another launcher on this machine serves it, or something else has the port.
    endpoint = StoreEndpoint(host, port, local_address, False, secret)
    try:
        return StoreClient((host, port), secret, patience_s=0.0, timeout_s=HANDSHAKE_S), endpoint
    except TransportError as error:
        return error


def _serve(
    host: str, interface: str, port: int, local_address: str, secret: bytes
) -> tuple[StoreClient, StoreEndpoint]:
    server = StoreServer(interface, secret, port)
    endpoint = StoreEndpoint(host, server.port, local_address, True, secret, server)
    try:
        return endpoint.connect(), endpoint
    except TransportError:
        server.close()
        raise


def _not_ours(address: str, error: Exception) -> ConfigError:
    if isinstance(error, OtherSecret):
        return ConfigError(
            "launch.secret_file",
            "(hidden)",
            f"the launcher at launch.address={address} has another secret than this one",
            f"give all nodes the same: in the file that launch.secret_file names, or in the variable {SECRET}; "
            "or choose another port, if that is another user's job",
        )
    return ConfigError(
        "launch.address",
        address,
        "something else than a launcher of windlass uses this port",
        "choose a port that is free on that node",
    )


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name is unknown ({error.strerror})"
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return str(getattr(cause, "strerror", None) or cause)
