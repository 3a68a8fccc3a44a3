"""Signed messages: what somebody on the way changes, repeats, drops or sends back is found."""

from __future__ import annotations

from typing import Any

import pytest
from transport_helpers import pair

from windlass.checkpoint.net.connection import Connection
from windlass.checkpoint.net.handshake import TransportError
from windlass.checkpoint.net.signed import SignedChannel


def raw(connection: Connection) -> dict[str, Any]:
    """A message as it is on the way."""
    return connection.receive()[0]


def test_messages_go_both_ways() -> None:
    with pair() as (here, there):
        mine, theirs = SignedChannel(here, is_connector=True), SignedChannel(there, is_connector=False)
        for message in ({"a": 1}, [], "text \u00ff\ud800", None):
            mine.send(message)
            assert theirs.receive() == message
            theirs.send([message])
            assert mine.receive() == [message]


@pytest.mark.parametrize("how", ["changed", "repeated", "dropped", "sent back", "unsigned", "of another connection"])
def test_what_somebody_on_the_way_does_is_found(how: str) -> None:
    with pair() as (here, there), pair() as (other_here, other_there):
        mine, theirs = SignedChannel(here, is_connector=True), SignedChannel(there, is_connector=False)
        mine.send({"key": "outcome", "value": "1"})
        frame = raw(there)
        if how == "repeated":
            here.send(frame)
            assert theirs.receive() == {"key": "outcome", "value": "1"}
        elif how == "changed":
            frame["body"] = frame["body"].replace('"1"', '"0"')
        elif how == "dropped":
            mine.send("the second")
            frame = raw(there)
        elif how == "unsigned":
            del frame["mac"]
        elif how == "of another connection":
            SignedChannel(other_here, is_connector=True).send({"key": "outcome", "value": "0"})
            frame = raw(other_there)
        if how == "sent back":
            there.send(frame)
            receiver, connection = mine, here
        else:
            here.send(frame)
            receiver, connection = theirs, there
        with pytest.raises(TransportError, match=r"not signed|not its own"):
            receiver.receive()
        assert connection.is_closed


def test_a_connection_without_a_handshake_has_no_key() -> None:
    with pair() as (here, _):
        here.session_key = b""
        with pytest.raises(ValueError, match="no key"):
            SignedChannel(here, is_connector=True)


def test_every_connection_has_another_key() -> None:
    with pair() as (here, there), pair() as (other, _):
        assert here.session_key == there.session_key != other.session_key
        assert len(here.session_key) == 32
