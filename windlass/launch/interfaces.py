"""Finds the addresses of this machine. Torch-free."""

from __future__ import annotations

import ipaddress
import socket

import psutil

LOOPBACK = "127.0.0.1"
NOWHERE = "192.0.2.1"
"""Nobody's address (RFC 5737): the way there is the way to other machines."""


def everywhere() -> str:
    """Returns the address that listens on every interface."""
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


def interface_of(address: str) -> str | None:
    """Returns the network interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(other.address.partition("%")[0] == address for other in addresses):
            return name
    return None


def listen_address(host: str, resolved: str) -> str:
    """Returns the address to listen on. A machine may know its own name as a loopback address, which others do not."""
    if ipaddress.ip_address(resolved).is_loopback and not _is_loopback_name(host, resolved):
        return everywhere()
    return resolved


def _is_loopback_name(host: str, resolved: str) -> bool:
    """Says if all machines know `host` as a loopback address."""
    return host in ("localhost", resolved)


def is_own(address: str) -> bool:
    """Says if an address is one of this machine's: no other can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def own_address(host: str, resolved: str, is_here: bool) -> str:
    """Returns the address by which others reach this node. A machine often knows its own name as a loopback address."""
    if is_here and not ipaddress.ip_address(resolved).is_loopback:
        return resolved
    if is_here and _is_loopback_name(host, resolved):
        return resolved
    target = NOWHERE if is_here else resolved
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # sends nothing: it only chooses a route
        except OSError:
            return resolved
        return probe.getsockname()[0]
