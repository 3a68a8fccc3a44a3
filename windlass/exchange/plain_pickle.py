"""A reader of pickles that a stranger may have written: of plain data and of records, and of nothing that runs.

Python's own unpicklers make what a file tells them to: a table of gigabytes for a memo's index, a list copied a million
times. Here each byte of the file makes at most one small object, keys of dicts are plain, and a class is a name in a
table that the caller gives. Torch-free.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_OPS = 30_000_000
"""The most of a file: each makes some 100 bytes at most. The table of contents of 100,000 tensors has 4 million."""
MAX_ARGUMENTS = 64


class Refused(ValueError):
    """A pickle that is not read; the text says why, as a clause."""


class Record:
    """The values of an object of the file, and nothing that it could do."""

    state: Any = None

    def field(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


def load(data: bytes, admitted: Mapping[tuple[str, str], Any]) -> Any:
    """Reads what a pickle of protocol 2 or later holds.

    Args:
        admitted: (module, name) -> what is taken for it: a subclass of `Record`, which is made without arguments; a
            function, which is called with at most `MAX_ARGUMENTS` plain values; or a value.

    Raises:
        Refused: it names something else, has other kinds of entries, or is cut off.
    """
    return _Reader(data, admitted).load()


class _Reader:
    def __init__(self, data: bytes, admitted: Mapping[tuple[str, str], Any]) -> None:
        self.data, self.admitted, self.position = data, admitted, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        try:
            for _ in range(MAX_OPS):
                op = self.data[self.position]
                self.position += 1
                if op == _STOP:
                    return self.stack.pop()
                _OPS[op](self)
        except KeyError as error:
            raise Refused(f"it has an entry of a kind that no such file needs ({error})") from None
        except (IndexError, struct.error):
            raise Refused("it is cut off, or not a pickle") from None
        except UnicodeDecodeError:
            raise Refused("it has text that is not UTF-8") from None
        raise Refused(f"it has over {MAX_OPS:,} entries")

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise IndexError
        found = self.data[self.position : end]
        self.position = end
        return found

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise IndexError
        text = self.take(end - self.position).decode()
        self.position += 1
        return text

    def items(self) -> list[Any]:
        """Takes what was put since the last mark."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def named(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)) or (module, name) not in self.admitted:
            raise Refused(f"it names {f'{module}.{name}'[:200]!r}, which no table of contents needs")
        self.stack.append(self.admitted[module, name])

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.named(module, name)

    def make(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS or not callable(kind):
            raise Refused("it makes something of what makes nothing")
        if isinstance(kind, type) and issubclass(kind, Record):
            self.stack.append(kind())
            return
        try:
            self.stack.append(kind(*arguments))
        except (TypeError, ValueError):
            raise Refused("it makes something of other arguments") from None

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise Refused("it changes what it did not make")
        self.stack[-1].state = state

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Refused("it sets keys of what has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (isinstance(key, str | int | Record) or _is_flat(key)):
                raise Refused("it has a key that is no plain value")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused("it appends to what is no list")
        target.extend(items)

    def pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Refused("it refers to what it has not")
        self.stack.append(self.memo[index])

    def long(self) -> None:
        size = self.number("<B")
        if size > 8:
            raise Refused("it has an integer beyond 64 bits")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def protocol(self) -> None:
        if self.number("<B") > 5:
            raise Refused("it is of a later protocol than 5")

    def frame(self) -> None:
        self.take(8)  # how much of the file is read at once, which is all of it


def _is_flat(key: Any) -> bool:
    """True if it is a tuple of plain values: of nested ones a hash may take for ever."""
    return isinstance(key, tuple) and len(key) <= MAX_ARGUMENTS and all(isinstance(item, str | int) for item in key)


_STOP = ord(".")
_OPS: dict[int, Callable[[_Reader], None]] = {
    0x80: _Reader.protocol,
    0x95: _Reader.frame,
    ord("("): _Reader.mark,
    ord(")"): lambda r: r.stack.append(()),
    ord("]"): lambda r: r.stack.append([]),
    ord("}"): lambda r: r.stack.append({}),
    ord("t"): lambda r: _put_tuple(r, r.items()),
    0x85: lambda r: _put_tuple(r, r.pop_many(1)),
    0x86: lambda r: _put_tuple(r, r.pop_many(2)),
    0x87: lambda r: _put_tuple(r, r.pop_many(3)),
    ord("a"): lambda r: r.append(r.pop_many(1)),
    ord("e"): lambda r: r.append(r.items()),
    ord("s"): lambda r: r.set_items(r.pop_many(2)),
    ord("u"): lambda r: r.set_items(r.items()),
    ord("N"): lambda r: r.stack.append(None),
    0x88: lambda r: r.stack.append(True),
    0x89: lambda r: r.stack.append(False),
    ord("K"): lambda r: r.stack.append(r.number("<B")),
    ord("M"): lambda r: r.stack.append(r.number("<H")),
    ord("J"): lambda r: r.stack.append(r.number("<i")),
    0x8A: _Reader.long,
    ord("G"): lambda r: r.stack.append(r.number(">d")),
    0x8C: lambda r: r.stack.append(r.take(r.number("<B")).decode()),
    ord("X"): lambda r: r.stack.append(r.take(r.number("<I")).decode()),
    0x8D: lambda r: r.stack.append(r.take(r.number("<Q")).decode()),
    ord("c"): lambda r: r.named(r.line(), r.line()),
    0x93: _Reader.stack_global,
    ord("R"): _Reader.make,
    0x81: _Reader.make,
    ord("b"): _Reader.build,
    0x94: lambda r: r.put(len(r.memo)),
    ord("q"): lambda r: r.put(r.number("<B")),
    ord("r"): lambda r: r.put(r.number("<I")),
    ord("h"): lambda r: r.get(r.number("<B")),
    ord("j"): lambda r: r.get(r.number("<I")),
}
"""The opcodes of the `pickle` module that plain data and records need."""


def _put_tuple(reader: _Reader, items: list[Any]) -> None:
    reader.stack.append(tuple(items))
