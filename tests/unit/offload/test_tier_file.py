"""Files of a tier: versions that can be kept, checksums, and folders that do not outlive their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.files import snapshot_of
from torch import Tensor

from windlass.errors import DoesNotFit, OffloadError
from windlass.offload.arena import Arena
from windlass.offload.direct_io import PAGE_BYTES, Engine
from windlass.offload.process_scratch import LOCK
from windlass.offload.tier_file import BLOCK_BYTES, HEADER_BYTES, Pin, TierFile, TierFolder, file_bytes

SIZES = [1, PAGE_BYTES, PAGE_BYTES + 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 77]
HEADER = b"h" * 2 * PAGE_BYTES


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=3)
    yield engine
    engine.close()


@pytest.fixture
def folder(engine: Engine, tmp_path: Path) -> Iterator[TierFolder]:
    folder = TierFolder(tmp_path / "tier", engine, "rank0")
    yield folder
    folder.close()


def pages(num_bytes: int, seed: int | None = None) -> Tensor:
    """Memory at a page's address, zeros if there is no seed."""
    data = Arena(max(1, num_bytes)).allocate(num_bytes).data
    if seed is not None:
        data.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return data


def read(file: TierFile) -> Tensor:
    into = pages(file.num_bytes)
    file.read(into).wait()
    return into


def pinned(pin: Pin) -> bytes:
    """The data of a pinned version."""
    return pin.path.read_bytes()[HEADER_BYTES : HEADER_BYTES + pin._owner.num_bytes]


def names(folder: TierFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()} - {LOCK}


@pytest.mark.parametrize("num_bytes", SIZES)
def test_the_newest_version_comes_back(num_bytes: int, folder: TierFolder) -> None:
    file = folder.create(num_bytes)
    assert (file.num_bytes, file.has_data) == (num_bytes, False)
    for seed in range(3):
        file.write(pages(num_bytes, seed)).wait()
        assert file.has_data
        assert torch.equal(read(file), pages(num_bytes, seed))
    assert len(names(folder)) == 1


def test_a_file_of_nothing(folder: TierFolder) -> None:
    file = folder.create(0)
    assert file.write(pages(0)).is_done
    assert read(file).nbytes == 0
    file.pin().release()


def test_many_files_are_under_way_at_a_time(folder: TierFolder) -> None:
    num_bytes = BLOCK_BYTES + 5
    files = [folder.create(num_bytes) for _ in range(8)]
    for transfer in [file.write(pages(num_bytes, seed)) for seed, file in enumerate(files)]:
        transfer.wait()
    buffers = [pages(num_bytes) for _ in files]
    for transfer in [file.read(into) for file, into in zip(files, buffers, strict=True)]:
        transfer.wait()
    assert all(torch.equal(into, pages(num_bytes, seed)) for seed, into in enumerate(buffers))
    assert folder.engine.figures.write_bytes == folder.engine.figures.read_bytes == 8 * (BLOCK_BYTES + PAGE_BYTES)


def test_a_read_waits_for_the_write_before_it(folder: TierFolder) -> None:
    may_write = threading.Event()
    for _ in range(3):  # all threads
        folder.engine.submit(lambda: may_write.wait(60) and None)
    file = folder.create(PAGE_BYTES)
    file.write(pages(PAGE_BYTES, 1))
    timer = threading.Timer(0.1, may_write.set)
    timer.start()
    assert torch.equal(read(file), pages(PAGE_BYTES, 1))


def test_nothing_is_written_over_while_it_is_read(folder: TierFolder) -> None:
    file = folder.create(PAGE_BYTES)
    file.write(pages(PAGE_BYTES, 1)).wait()
    may_read = threading.Event()
    for _ in range(3):
        folder.engine.submit(lambda: may_read.wait(60) and None)
    transfer = file.read(pages(PAGE_BYTES))
    with pytest.raises(AssertionError, match="being read"):
        file.write(pages(PAGE_BYTES, 2))
    may_read.set()
    transfer.wait()
    file.write(pages(PAGE_BYTES, 2)).wait()
    assert torch.equal(read(file), pages(PAGE_BYTES, 2))


def test_a_pinned_version_stays_as_it_is(folder: TierFolder) -> None:
    num_bytes = BLOCK_BYTES + 5
    file = folder.create(num_bytes)
    file.write(pages(num_bytes, 1)).wait()
    pin, again = file.pin(), file.pin()
    for seed in (2, 3):
        file.write(pages(num_bytes, seed)).wait()
        assert torch.equal(read(file), pages(num_bytes, seed))
        assert pinned(pin) == bytes(pages(num_bytes, 1).numpy())
    assert len(names(folder)) == 2
    pin.release()
    newest = file.pin()
    file.write(pages(num_bytes, 4)).wait()
    assert pinned(again) == bytes(pages(num_bytes, 1).numpy()), "it was pinned twice"
    assert pinned(newest) == bytes(pages(num_bytes, 3).numpy())
    assert len(names(folder)) == 3


def test_released_files_are_used_again(folder: TierFolder) -> None:
    file = folder.create(PAGE_BYTES)
    for seed in range(10):
        file.write(pages(PAGE_BYTES, seed)).wait()
        pin = file.pin()
        file.write(pages(PAGE_BYTES, 100 + seed)).wait()
        pin.release()
    assert len(names(folder)) == 2


def test_a_pin_that_is_released_before_the_next_write_costs_nothing(folder: TierFolder) -> None:
    file = folder.create(PAGE_BYTES)
    for seed in range(3):
        file.write(pages(PAGE_BYTES, seed)).wait()
        file.pin().release()
    assert len(names(folder)) == 1


@pytest.mark.parametrize("is_written_first", [True, False], ids=["written, then released", "released, then written"])
def test_a_link_keeps_a_version_for_good(is_written_first: bool, folder: TierFolder, tmp_path: Path) -> None:
    file = folder.create(PAGE_BYTES)
    links = []
    for seed in range(4):
        file.write(pages(PAGE_BYTES, seed)).wait()
        pin = file.pin()
        links.append(tmp_path / str(seed))
        os.link(pin.path, links[-1])
        if is_written_first:
            file.write(pages(PAGE_BYTES, 50 + seed)).wait()
        pin.release()
    folder.close()
    for seed, link in enumerate(links):
        assert link.read_bytes()[HEADER_BYTES:] == bytes(pages(PAGE_BYTES, seed).numpy())
    assert snapshot_of(tmp_path / "tier") == {}


def test_a_header_lies_right_before_the_data(folder: TierFolder) -> None:
    file = folder.create(PAGE_BYTES + 1)
    for header in (HEADER, b"x" * HEADER_BYTES):
        file.write(pages(PAGE_BYTES + 1, 1)).wait()
        pin = file.pin(header)
        expected = header + bytes(pages(PAGE_BYTES + 1, 1).numpy())
        assert b"".join(pin.read())[: len(expected)] == expected
        assert pin.path.read_bytes()[pin.offset :][: len(expected)] == expected
        pin.release()


def test_a_kept_version_has_one_header(folder: TierFolder, tmp_path: Path) -> None:
    file = folder.create(PAGE_BYTES)
    file.write(pages(PAGE_BYTES, 1)).wait()
    file.pin(HEADER[:PAGE_BYTES]).release()
    pin = file.pin(HEADER)
    file.pin(HEADER).release()
    file.pin().release()
    with pytest.raises(ValueError, match="another header"):
        file.pin(b"x" * PAGE_BYTES)
    os.link(pin.path, tmp_path / "link")
    pin.release()
    with pytest.raises(ValueError, match="another header"):
        file.pin(b"x" * PAGE_BYTES)
    file.write(pages(PAGE_BYTES, 2)).wait()
    file.pin(b"x" * PAGE_BYTES).release()


@pytest.mark.parametrize("length", [1, PAGE_BYTES + 1, HEADER_BYTES + PAGE_BYTES])
def test_headers_of_other_lengths_are_refused(length: int, folder: TierFolder) -> None:
    file = folder.create(PAGE_BYTES)
    file.write(pages(PAGE_BYTES, 1)).wait()
    with pytest.raises(ValueError, match=f"not {length}"):
        file.pin(bytes(length))


def test_data_of_another_kind_is_refused(folder: TierFolder) -> None:
    file = folder.create(PAGE_BYTES)
    for data in (pages(PAGE_BYTES - 1), pages(2 * PAGE_BYTES)[8 : PAGE_BYTES + 8], pages(PAGE_BYTES).view(torch.int8)):
        with pytest.raises(ValueError, match=f"data must be {PAGE_BYTES} uint8 at a page's address"):
            file.write(data)
    assert not file.has_data
    with pytest.raises(AssertionError, match="before it is read"):
        file.read(pages(PAGE_BYTES))


def test_space_is_checked_before_anything_is_made(folder: TierFolder) -> None:
    folder.reserve(PAGE_BYTES)
    free = os.statvfs(folder.path).f_bavail * os.statvfs(folder.path).f_frsize
    with pytest.raises(DoesNotFit, match=r"offload\.dir=.* needs [0-9,]+ bytes .* [0-9,]+ are free\. Fix: free space"):
        folder.reserve(2 * free)
    assert file_bytes(PAGE_BYTES + 1) == HEADER_BYTES + 2 * PAGE_BYTES
    folder.create(PAGE_BYTES + 1)
    assert [path.stat().st_size for path in folder.path.glob("*.tier")] == [file_bytes(PAGE_BYTES + 1)]


def test_a_folder_is_its_users_alone_and_gone_when_it_is_closed(folder: TierFolder) -> None:
    path = folder.path
    assert path.name.startswith("rank0.") and path.stat().st_mode & 0o777 == 0o700
    file = folder.create(3 * BLOCK_BYTES)
    transfer = file.write(pages(3 * BLOCK_BYTES, 1))
    pin = file.pin()
    folder.close()
    assert transfer.is_done and not path.exists()
    folder.close()
    pin.release()
    with pytest.raises(OffloadError):
        file.write(pages(3 * BLOCK_BYTES, 1))


def test_folders_of_the_living_are_left_alone(folder: TierFolder, engine: Engine) -> None:
    parent = folder.path.parent
    file = folder.create(PAGE_BYTES)
    file.write(pages(PAGE_BYTES, 1)).wait()
    for name in ("users", "users.0123456789abcdef"):
        (parent / name).mkdir()
        (parent / name / "file").write_text("mine")
    (parent / "file.0123456789abcdef").write_text("mine")
    other = TierFolder(parent, engine, "rank0")
    assert other.path != folder.path
    other.close()
    assert torch.equal(read(file), pages(PAGE_BYTES, 1))
    assert len(snapshot_of(parent)) == 5, "a file and a lock, and three of the user"


def test_folders_of_the_dead_are_removed(engine: Engine, tmp_path: Path) -> None:
    for name, files in (("rank0.0123456789abcdef", [LOCK, "0.tier", "1.tier"]), ("rank1.00000000000000ff", [])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes(b"x")
    folder = TierFolder(tmp_path, engine, "rank0")
    assert list(tmp_path.iterdir()) == [folder.path]
    folder.close()


START = """
import os, signal, sys, threading
from pathlib import Path
from windlass.offload.direct_io import Engine
from windlass.offload.tier_file import TierFolder
folder = TierFolder(Path(sys.argv[1]), Engine(1), "rank0")
folder.create(1 << 20)
"""


def run(program: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", START + program, str(folder)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit(0)"])
def test_a_program_that_ends_without_closing_leaves_nothing(end: str, tmp_path: Path) -> None:
    with run(end, tmp_path) as process:
        assert process.wait() == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_children_of_a_process_neither_remove_its_folder_nor_keep_it(engine: Engine, tmp_path: Path) -> None:
    """Data loaders are forked, some end like any program, and some live on for seconds when the trainer is killed."""
    program = """
if os.fork() == 0:
    sys.exit(0)  # runs what is to be run at the end
os.wait()
child = os.fork()
if child == 0:
    signal.pause()
print(child, len(list(folder.path.iterdir())), flush=True)
signal.pause()
"""
    with run(program, tmp_path) as process:
        assert process.stdout is not None
        child, num_files = map(int, process.stdout.readline().split())
        try:
            assert num_files == 2, "the lock and a file"
            process.kill()
            process.wait()
            folder = TierFolder(tmp_path, engine, "rank0")
            assert list(tmp_path.iterdir()) == [folder.path]
            folder.close()
        finally:
            os.kill(child, signal.SIGKILL)
