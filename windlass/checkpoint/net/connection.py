"""Framed TCP between snapshot agents: a JSON header and a raw payload, straight from and into the memory that has it.

Blocking sockets and a thread a connection, because what moves is hundreds of MB, and what is done with them (erasure
coding, checksums) releases the GIL. A peer that does not read makes the sender wait; one that stops, or whose network
is cut, is given up after the idle timeout. Nothing of a peer is read before it has passed the handshake.
"""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.net.pacer import Pacer
from windlass.checksum import crc32c
from windlass.isal import byte_array

if TYPE_CHECKING:
    from types import TracebackType

    from windlass.isal import Memory

IDLE_S = 30.0
"""A peer from which nothing comes, or to which nothing goes, for so long is given up."""
MAX_HEADER_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 30

_MAGIC = b"wlas"
_LENGTHS = struct.Struct("<4sIQI")
"""Magic, length of the header, length of the payload, CRC32C of the header."""
_CHECK = struct.Struct("<I")
"""CRC32C of the lengths, so that damage to them is found before anything is allocated for it."""
_PREFIX_BYTES = _LENGTHS.size + _CHECK.size
_SCRATCH_BYTES = 256 << 10
_SEND_BUFFER_BYTES = 512 << 10
"""Fits the caches: on loopback twice as fast, at half the CPU time, as the buffer of 4 MiB that Linux grows to."""
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""Seconds, seconds, probes: ends the wait for a peer's next frame when its node is gone."""


class PeerClosed(TransportError):
    """The peer closed the connection between two frames."""


class Connection:
    """One connection, TCP or of this node alone. Any thread may send or close; one at a time receives.

    Every error closes it, because a stream that was left within a frame cannot be read on.

    Args:
        sock: connected. The connection owns it from now on.
        peer: who is at the other end, for messages.
        pacer: what sends wait for; None: nothing.
    """

    def __init__(self, sock: socket.socket, peer: str, pacer: Pacer | None = None) -> None:
        self.peer = peer
        self.session_key = b""
        """Known to both ends alone, once they have shaken hands."""
        self._socket, self._pacer = sock, pacer or Pacer(None)
        self._idle_s: float | None = IDLE_S
        self._unread = 0
        self._send_lock = threading.Lock()
        self._state = threading.Lock()
        self._num_users, self._is_closed = 0, False
        if sock.family != socket.AF_UNIX:
            _set_options(sock)
        self.settimeout(IDLE_S)

    def shake_hands(self, prove: Callable[[], bytes]) -> None:
        """Runs `prove` on the socket, before anything else is sent or received; it returns the session's key.

        Raises:
            RefusedPeer: `prove` did. The connection is closed.
            TransportError: it was closed meanwhile.
        """
        with self._using() as sock:
            self.session_key = prove()
            sock.settimeout(self._idle_s)

    def break_when_cut(self, within_s: float) -> None:
        """Has the system give a TCP connection up, idle or not, when its peer's machine has been silent for `within_s`,
        and not the peer itself. Linux would try, by itself, for 15 minutes."""
        with self._using() as sock:
            for name, value in (
                ("TCP_USER_TIMEOUT", int(1000 * within_s)),  # of what is to be delivered
                ("TCP_KEEPIDLE", max(1, int(within_s / 2))),
                ("TCP_KEEPINTVL", 1),
                ("TCP_KEEPCNT", max(1, int(within_s / 2))),
            ):
                if hasattr(socket, name):  # not on every system
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def settimeout(self, idle_s: float | None) -> None:
        """Seconds without a moving byte after which a send or receive gives the peer up; None: it waits for ever."""
        with self._using() as sock:
            self._idle_s = idle_s
            sock.settimeout(idle_s)

    def send(self, header: dict[str, Any], payload: Memory | None = None) -> None:
        """Sends one frame. Returns when the system has it, which says nothing about the peer.

        Args:
            header: JSON.
            payload: contiguous memory. Not copied, so it must not change meanwhile.

        Raises:
            TypeError: the header is no JSON.
            ValueError: the header or the payload is too large, or the payload is not contiguous CPU memory.
            TransportError: the peer is gone, or has not read for the idle timeout.
        """
        text = json.dumps(header, separators=(",", ":")).encode()
        body = memoryview(b"") if payload is None else byte_array(payload, "payload").data
        if len(text) > MAX_HEADER_BYTES or len(body) > MAX_PAYLOAD_BYTES:
            raise ValueError(
                f"a frame of {len(text)} + {len(body)} bytes is too large: the limits are "
                f"{MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}"
            )
        lengths = _LENGTHS.pack(_MAGIC, len(text), len(body), crc32c(text))
        head = memoryview(lengths + _CHECK.pack(crc32c(lengths)) + text)
        slice_bytes = self._pacer.slice_bytes
        with self._send_lock, self._using() as sock:
            self._pacer.take(len(head))
            if not body:
                _send_all(sock, [head])
            for start in range(0, len(body), slice_bytes):
                part = body[start : start + slice_bytes]
                self._pacer.take(len(part))
                _send_all(sock, [part] if start else [head, part])

    def receive(self, wait_s: float | None = None) -> tuple[dict[str, Any], int]:
        """The header of the next frame, and the bytes of payload that follow: to be received or skipped next.

        Args:
            wait_s: how long to wait for the frame to begin, `math.inf` for ever; None: the idle timeout.

        Raises:
            PeerClosed: the peer has closed the connection, and sent no part of another frame.
            TransportError: the peer is gone or silent, or the frame is damaged.
            RuntimeError: the last frame's payload was not read.
        """
        if self._unread:
            raise RuntimeError(f"{self._unread} bytes of the last frame's payload are neither received nor skipped")
        with self._using() as sock:
            if wait_s is not None:
                _wait_readable(sock, wait_s)
            prefix = memoryview(bytearray(_PREFIX_BYTES))
            begun = sock.recv_into(prefix)
            if not begun:
                raise PeerClosed(f"{self.peer} closed the connection")
            self._fill(sock, prefix[begun:])
            header_bytes, payload_bytes, checksum = self._check_prefix(bytes(prefix))
            text = bytearray(header_bytes)
            self._fill(sock, memoryview(text))
            if crc32c(text) != checksum:
                raise TransportError(f"{self.peer} sent a damaged header")
            header = self._parse(text)
            self._unread = payload_bytes
        return header, payload_bytes

    def has_begun_to_send(self, wait_s: float) -> bool:
        """True if something is there to be received, or the end of the connection, within `wait_s`.

        Raises:
            TransportError: the connection is closed.
        """
        with self._using() as sock:
            return _is_readable(sock, wait_s)

    def receive_into(self, buffer: memoryview) -> None:
        """Fills `buffer` with the next bytes of the payload.

        Raises:
            ValueError: it is longer than what is left of the payload, not contiguous, or read-only.
            TransportError: the peer is gone or silent.
        """
        view = byte_array(buffer, "buffer", writable=True).data
        self._check_unread(len(view))
        with self._using() as sock:
            self._fill(sock, view)
            self._unread -= len(view)

    def skip(self, num_bytes: int) -> None:
        """Reads the next `num_bytes` of the payload and forgets them.

        Raises:
            ValueError: so much is not left of the payload.
            TransportError: the peer is gone or silent.
        """
        self._check_unread(num_bytes)
        scratch = memoryview(bytearray(min(num_bytes, _SCRATCH_BYTES)))
        with self._using() as sock:
            for start in range(0, num_bytes, _SCRATCH_BYTES):
                self._fill(sock, scratch[: num_bytes - start])
            self._unread -= num_bytes

    def close(self) -> None:
        """Wakes whoever sends or receives, which fails then. Never waits."""
        with self._state:
            if self._is_closed:
                return
            self._is_closed = True
            with suppress(OSError):  # the peer was faster
                self._socket.shutdown(socket.SHUT_RDWR)
            self._release()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _using(self) -> Iterator[socket.socket]:
        """The socket, whose number the system gives to no other while it is in use: the last user closes it."""
        with self._state:
            if self._is_closed:
                raise TransportError(f"the connection with {self.peer} is closed")
            self._num_users += 1
        is_whole = False
        try:
            yield self._socket
            is_whole = True
        except OSError as error:
            if self._is_closed:
                raise TransportError(f"the connection with {self.peer} is closed") from error
            if isinstance(error, TransportError):
                raise
            if isinstance(error, TimeoutError):
                raise TransportError(f"{self.peer} has stopped: nothing moved for {self._idle_s} s") from error
            raise TransportError(f"the connection with {self.peer} failed: {error.strerror}") from error
        finally:
            if not is_whole:  # also after Ctrl-C
                self.close()
            with self._state:
                self._num_users -= 1
                self._release()

    def _release(self) -> None:
        if self._is_closed and self._num_users == 0:
            self._socket.close()

    def _fill(self, sock: socket.socket, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = sock.recv_into(view[done:])
            if not count:
                raise TransportError(f"{self.peer} closed the connection within a frame")
            done += count

    def _check_prefix(self, prefix: bytes) -> tuple[int, int, int]:
        """Lengths of header and payload, and the header's checksum."""
        lengths, check = prefix[: _LENGTHS.size], prefix[_LENGTHS.size :]
        magic, header_bytes, payload_bytes, checksum = _LENGTHS.unpack(lengths)
        if magic != _MAGIC or _CHECK.unpack(check)[0] != crc32c(lengths):
            raise TransportError(f"{self.peer} sent a damaged frame")
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise TransportError(f"{self.peer} sent a frame of {header_bytes} + {payload_bytes} bytes: too large")
        return header_bytes, payload_bytes, checksum

    def _parse(self, text: bytearray) -> dict[str, Any]:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TransportError(f"{self.peer} sent a header that is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise TransportError(f"{self.peer} sent a header that is no object")
        return header

    def _check_unread(self, num_bytes: int) -> None:
        if not 0 <= num_bytes <= self._unread:
            raise ValueError(f"{num_bytes} bytes of a payload of which {self._unread} are left")


def _set_options(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def address_text(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _send_all(sock: socket.socket, parts: list[memoryview]) -> None:
    """Gathers `parts`, as often as the system takes only some of them."""
    while parts:
        sent = sock.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


def _wait_readable(sock: socket.socket, wait_s: float) -> None:
    if not _is_readable(sock, wait_s):
        raise TransportError(f"no frame came within {wait_s} s")


def _is_readable(sock: socket.socket, wait_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if math.isinf(wait_s) else math.ceil(wait_s * 1000)))
