"""Documents that a stranger may have written, for fuzz tests of all that reads found files; and limits to read them in.

    @given(data=hostile.json_document(good) | hostile.damaged(good_bytes))
    def check(data): ...        # returns, or raises WindlassError

`run_limited` does a whole campaign in a process of its own, which may die of what it finds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from windlass.errors import WindlassError

QUICK = settings(
    max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
"""Of `make test`: the same inputs each time."""
MEMORY_BYTES = 4 << 30
"""What a reader may take for a document of some kilobytes, at most."""

MAX_CHILD_SECONDS = 30.0

DEEP = 100_000
SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 1.5, -0.0, 1e308, 1e-320,
    float("inf"), float("nan"), "", "a", "0", "..", "../../x", "/etc/passwd", "\0", "\n", "\x1b[31m", "\ud800",
    "a" * 5000,
]  # fmt: skip
RAW = [
    b"", b" ", b"{", b"[", b"]", b"}", b"null", b"{}", b"[]", b"NaN", b'"', b"1" * 5000, b"-" + b"9" * 400, b"1e999999",
    b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP, b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0" * 100, b"{}{}",
    b'{"a": 1, "a": 2}', b'"\\ud800"', b"[1,]",
]  # fmt: skip
"""Documents that are wrong as a whole."""


def values() -> st.SearchStrategy[Any]:
    """JSON values, most of them of the wrong type or out of all bounds."""
    nested = st.sampled_from([[], {}, [[]], [{}], {"a": {"a": {}}}, [0] * 1000, {str(i): i for i in range(500)}])
    return st.sampled_from(SCALARS) | nested | st.integers() | st.text(max_size=9)


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON value like `document`, with one to three parts replaced, removed, doubled or added."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(values())
        parent, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))
        if kind == "remove":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["", "x", "format", "name", "\ud800", "__class__"]))] = draw(values())
        elif kind == "add":
            parent.extend([parent[key]] * draw(st.sampled_from([1, 3, 1000])))
        elif kind == "swap":
            other, other_key = draw(st.sampled_from(places))
            parent[key] = json.loads(json.dumps(other[other_key])) if other_key in _keys(other) else None
        else:
            parent[key] = draw(values())
    return document


def json_document(good: Any) -> st.SearchStrategy[bytes]:
    """The text of JSON documents like `good`, changed in its values or in its bytes; and some that are unlike it."""
    encoded = changed(good).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass"))
    return encoded | damaged(json.dumps(good).encode()) | st.sampled_from(RAW)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with some bytes changed, cut off, left out, doubled or put in; or something else altogether."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "drop", "double", "insert", "number"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at : at + 1] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B, 0x5B]))])
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        else:  # a length or an offset
            number = draw(st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**62, -5]))
            width = draw(st.sampled_from([4, 8]))
            data[at : at + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "little")
    return bytes(data)


@contextmanager
def limited_memory(num_bytes: int = MEMORY_BYTES) -> Iterator[None]:
    """Has allocations of this process fail that take so much more than it has now."""
    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if not statm.exists():
        yield
        return
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def in_child(action: Callable[[], object], num_bytes: int) -> None:
    """Runs `action` in a fork of this process that has so much memory, as tokens are made in processes of their own.

    A WindlassError, and an abort for want of memory, are what the parent of such a process makes one message of.

    Raises:
        AssertionError: it ended otherwise.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()  # of an abort, which is foreseen
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with limited_memory(num_bytes):
                action()
            code = 0
        except (WindlassError, MemoryError):
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGABRT), f"a child ended with {code}"
    assert usage.ru_utime + usage.ru_stime < MAX_CHILD_SECONDS, "a child took long"


def refuse_writes_outside(folder: Path) -> None:
    """Ends this process, from now on, when it opens a file to write, renames, links or deletes one outside `folder`."""
    set_hypothesis_home_dir(folder / "hypothesis")  # or it would be the first to write
    inside = (str(folder.resolve()), "/dev/null", "/proc/self")
    # The event of each has these arguments as paths, relative to the folder that is open as its last one.
    changes = {"remove": (0,), "rmdir": (0,), "mkdir": (0,), "symlink": (1,), "rename": (0, 1), "link": (0, 1)}

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        base = ""
        if event == "open":
            path, _, flags = arguments
            paths = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
        elif event.startswith("os.") and event[3:] in changes:
            paths = [arguments[i] for i in changes[event[3:]]]
            base = "" if arguments[-1] == -1 else os.readlink(f"/proc/self/fd/{arguments[-1]}")  # noqa: PTH115
        else:
            return
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(os.path.join(base, os.fsdecode(path)))  # noqa: PTH118
                if not real.startswith(inside):
                    sys.stderr.write(f"{event} of {real}, which is outside of {folder}\n")
                    os._exit(3)

    sys.addaudithook(watch)


def run_limited(code: str, *arguments: object, timeout_s: float) -> str:
    """Runs `code` in another Python, with the path of this one, and returns what it printed.

    Raises:
        AssertionError: it failed, died of a signal, or took longer. The message has the end of its stderr.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RUST_BACKTRACE": "0"}
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
        stdout, stderr = process.communicate()
        raise AssertionError(f"hangs after {timeout_s:g} s: {stdout[-2000:]}{stderr[-4000:]}") from None
    assert process.returncode == 0, f"ended with {process.returncode}: {stdout[-2000:]}{stderr[-6000:]}"
    return stdout


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in _keys(node):
        yield node, key
        yield from _places(node[key])


def _keys(node: Any) -> list[Any]:
    return list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
