"""Direct transfers of any size, the threads that carry them out, and what a failing disk is called."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.files import disk_full_after

from windlass.errors import OffloadError
from windlass.offload import direct_io
from windlass.offload.direct_io import PAGE_BYTES, DirectFile, Engine, IOFigures, disk_error, why_not_direct

SIZES = [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES, (1 << 20) + 77]
LATE_S = 60.0
"""After which something has hung."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=2)
    yield engine
    engine.close()


def pages(num_bytes: int, fill: bytes = b"\xaa") -> memoryview:
    """Memory at a page's address."""
    memory = mmap.mmap(-1, direct_io.round_to_pages(num_bytes))
    memory[:] = fill * len(memory)
    return memoryview(memory)


def new_file(path: Path, num_bytes: int, direct: bool | None = None) -> DirectFile:
    if direct is None:
        direct = why_not_direct(path.parent) is None
    return DirectFile(path, num_bytes, direct, IOFigures())


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("offset", [0, 2 * PAGE_BYTES])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_of_any_number_come_back(size: int, offset: int, direct: bool, tmp_path: Path) -> None:
    if direct and why_not_direct(tmp_path) is not None:
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    file = new_file(tmp_path / "file", offset + size, direct)
    source, target = pages(size), pages(size)
    source[:size] = data = os.urandom(size)
    file.write_from(source[:size], offset)
    assert file.path.read_bytes() == bytes(offset) + data + bytes(-size % PAGE_BYTES), "the last page ends in zeros"
    file.read_into(target[:size], offset)
    assert target[:size] == data
    assert bytes(target[size:]) == b"\xaa" * (-size % PAGE_BYTES), "nothing is written beyond the buffer"


def test_files_are_of_whole_pages_their_users_alone_and_new(tmp_path: Path) -> None:
    file = new_file(tmp_path / "file", PAGE_BYTES + 1)
    status = file.path.stat()
    assert (status.st_size, status.st_mode & 0o777, file.num_links()) == (2 * PAGE_BYTES, 0o600, 1)
    assert status.st_blocks * 512 >= 2 * PAGE_BYTES, "the space is taken at once"
    with pytest.raises(FileExistsError):
        new_file(tmp_path / "file", 1)


def test_a_file_that_cannot_have_its_space_is_not_left(tmp_path: Path) -> None:
    with disk_full_after(PAGE_BYTES), pytest.raises(OSError, match="File too large"):
        new_file(tmp_path / "file", 2 * PAGE_BYTES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 3, PAGE_BYTES, PAGE_BYTES + 9])
def test_a_file_that_was_cut_is_said_to_be(length: int, tmp_path: Path) -> None:
    file = new_file(tmp_path / "file", 3 * PAGE_BYTES)
    os.truncate(file.path, length)
    with pytest.raises(OffloadError, match=rf"file: ends at byte {length}, .* something has cut it\. Fix: .* resume"):
        file.read_into(pages(2 * PAGE_BYTES + 5), 0)


def test_a_write_that_ends_early_goes_on_until_it_fails(tmp_path: Path) -> None:
    """The system writes what there is room for, and says how much that was; the next call says why it was not all."""
    file = new_file(tmp_path / "file", 4 * PAGE_BYTES)
    with disk_full_after(2 * PAGE_BYTES), pytest.raises(OffloadError, match=r"File too large\. Fix: .*ulimit -f"):
        file.write_from(pages(4 * PAGE_BYTES), 0)
    assert file.path.read_bytes() == b"\xaa" * 2 * PAGE_BYTES + bytes(2 * PAGE_BYTES)


def test_calls_that_move_a_part_are_followed_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signals and network file systems cut calls short."""

    def a_page_at_a_time(call: Any) -> Any:
        return lambda descriptor, buffers, offset: call(descriptor, [buffers[0][:PAGE_BYTES]], offset)

    file = new_file(tmp_path / "file", 4 * PAGE_BYTES)
    source, target = pages(3 * PAGE_BYTES + 9), pages(3 * PAGE_BYTES + 9)
    source[:] = os.urandom(source.nbytes)
    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, a_page_at_a_time(getattr(os, name)))
    size = 3 * PAGE_BYTES + 9
    file.write_from(source[:size], 0)
    file.read_into(target[:size], 0)
    assert target[:size] == source[:size]


@pytest.mark.parametrize("name", ["read", "write"])
def test_a_closed_file_fails_and_no_other_is_touched(name: str, tmp_path: Path) -> None:
    file = new_file(tmp_path / "file", PAGE_BYTES)
    file.close()
    file.close()
    other = new_file(tmp_path / "other", PAGE_BYTES)  # which may get its descriptor
    with pytest.raises(OffloadError, match=rf"cannot {name} 4096 bytes at 0: Bad file descriptor\. Fix: see .*dmesg"):
        (file.read_into if name == "read" else file.write_from)(pages(PAGE_BYTES), 0)
    assert other.path.read_bytes() == bytes(PAGE_BYTES)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    for number, fix in ((errno.ENOSPC, "free space"), (errno.EIO, "dmesg"), (errno.EMFILE, "ulimit -n")):
        message = str(disk_error(tmp_path, "cannot write", OSError(number, os.strerror(number))))
        assert message.startswith(f"offload.dir={tmp_path}: cannot write: {os.strerror(number)}. Fix: ")
        assert fix in message


def test_what_is_moved_is_counted(tmp_path: Path) -> None:
    file = new_file(tmp_path / "file", 3 * PAGE_BYTES)
    file.write_from(pages(3 * PAGE_BYTES)[: 2 * PAGE_BYTES + 1], 0)
    file.read_into(pages(PAGE_BYTES), 0)
    figures = file._figures
    assert (figures.write_bytes, figures.read_bytes) == (3 * PAGE_BYTES, PAGE_BYTES)
    assert figures.write_s > 0 and figures.read_s > 0


def test_a_file_system_that_refuses_direct_io_is_told_from_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_open = os.open

    def refuse(number: int) -> Any:
        def open(path: Any, flags: int, *mode: int, **more: Any) -> int:
            if flags & direct_io.O_DIRECT:
                raise OSError(number, os.strerror(number))
            return really_open(path, flags, *mode, **more)

        return open

    monkeypatch.setattr(os, "open", refuse(errno.EINVAL))
    assert why_not_direct(tmp_path) == "the file system refuses O_DIRECT (Invalid argument)"
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    with pytest.raises(OffloadError, match=r"Read-only file system\. Fix: .* can be written"):
        why_not_direct(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_parts_are_done_when_the_wait_is_over(engine: Engine) -> None:
    done: list[int] = []
    transfer = engine.submit(*(lambda number=number: done.append(number) for number in range(100)))
    transfer.wait()
    assert transfer.is_done and sorted(done) == list(range(100))


def test_nothing_is_done_at_once(engine: Engine) -> None:
    transfer = engine.submit()
    assert transfer.is_done
    transfer.wait()


def test_as_many_parts_are_under_way_as_there_are_threads() -> None:
    engine = Engine(num_threads=5)
    barrier = threading.Barrier(5, timeout=LATE_S)
    engine.submit(*[barrier.wait] * 5).wait()
    engine.close()


def test_the_first_error_is_raised_when_all_parts_have_ended(engine: Engine) -> None:
    may_end, done = threading.Event(), threading.Event()

    def fail() -> None:
        raise OffloadError("offload.dir", "place", "first", "none")

    def end_late() -> None:
        may_end.wait(LATE_S)
        done.set()
        raise OffloadError("offload.dir", "place", "second", "none")

    transfer = engine.submit(fail, end_late)
    assert not transfer.is_done
    may_end.set()
    for _ in range(2):
        with pytest.raises(OffloadError, match="first"):
            transfer.wait()
        assert done.is_set()
    engine.submit(*[lambda: None] * 10).wait()  # the threads are still there


def test_an_engine_does_what_it_was_given_before_it_closes() -> None:
    engine = Engine(num_threads=1)
    may_begin, done = threading.Event(), []
    engine.submit(lambda: may_begin.wait(LATE_S) and None)
    engine.submit(*[lambda: done.append(None)] * 20)
    may_begin.set()
    engine.close()
    engine.close()
    assert len(done) == 20
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(lambda: None)


def test_a_buffer_is_free_as_soon_as_its_transfer_is_done(engine: Engine) -> None:
    """Threads that wait for work must not keep the memory of what they did last."""
    memory = bytearray(10)
    view = memoryview(memory)
    engine.submit(lambda view=view: view.nbytes and None).wait()
    del view
    for _ in range(1000):
        try:
            memory.append(1)  # refused while anybody has a view
        except BufferError:
            time.sleep(0.01)
        else:
            return
    pytest.fail("a thread still has the buffer")


def test_a_forked_process_has_no_engine(engine: Engine) -> None:
    child = os.fork()
    if child == 0:
        try:
            engine.submit(lambda: None)
        except RuntimeError:
            engine.close()  # and does not wait for threads that are not there
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_program_ends_without_waiting_for_its_threads() -> None:
    program = "import time; from windlass.offload.direct_io import Engine; Engine(1).submit(lambda: time.sleep(3600))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=LATE_S)
