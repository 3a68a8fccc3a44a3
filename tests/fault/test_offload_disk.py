"""Disks that are full, fail, lie or vanish under a tier: one clear error, and what was kept stays."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.agents import small_tmpfs
from support.files import disk_full_after, flip
from support.ranks import CONTEXT
from torch import Tensor

from windlass.errors import DoesNotFit, OffloadError
from windlass.offload.arena import Arena
from windlass.offload.direct_io import PAGE_BYTES, Engine
from windlass.offload.process_scratch import LOCK
from windlass.offload.tier_file import BLOCK_BYTES, HEADER_BYTES, TierFile, TierFolder, file_bytes

SIZE = 2 * BLOCK_BYTES + 77
NO_ROOM = r"(No space left on device|Input/output error)"
"""What a file system says when the disk under it is full: it thought that the space was its own."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(num_threads=3)
    yield engine
    engine.close()


@contextlib.contextmanager
def opened(parent: Path, engine: Engine) -> Iterator[TierFolder]:
    folder = TierFolder(parent, engine, "rank0")
    try:
        yield folder
    finally:
        folder.close()


@pytest.fixture
def folder(engine: Engine, tmp_path: Path) -> Iterator[TierFolder]:
    with opened(tmp_path / "tier", engine) as folder:
        yield folder


def pages(num_bytes: int, seed: int = 0) -> Tensor:
    return Arena(num_bytes).allocate(num_bytes).data.random_(0, 256, generator=torch.Generator().manual_seed(seed))


def read(file: TierFile) -> Tensor:
    into = pages(file.num_bytes)
    file.read(into).wait()
    return into


def written(folder: TierFolder, num_bytes: int = SIZE, seed: int = 1) -> TierFile:
    file = folder.create(num_bytes)
    file.write(pages(num_bytes, seed)).wait()
    return file


def file_of(folder: TierFolder) -> Path:
    (path,) = folder.path.glob("*.tier")
    return path


def mounted(
    kind: str, source: Path | str, target: Path, options: str = "defaults"
) -> contextlib.AbstractContextManager:
    """A file system; skips the test where this process may not mount one."""

    @contextlib.contextmanager
    def mount() -> Iterator[Path]:
        target.mkdir()
        command = ["mount", "-t", kind, "-o", options, str(source), str(target)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"{kind} cannot be mounted here")
        try:
            yield target
        finally:
            subprocess.run(["umount", "--lazy", str(target)], check=True)

    return mount()


@contextlib.contextmanager
def thin_disk(parent: Path, num_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A file system of 64 MB on a disk that has room for `num_bytes` only, and the file that is the disk.

    The file system finds out at a write. What the file does not have any more is EIO at a read.
    """
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    with small_tmpfs(parent, num_bytes) as backing:
        disk = backing / "disk"
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(disk)], check=True, capture_output=True)
        with mounted("ext4", disk, parent / "disk", "loop") as folder:
            yield folder, disk


def test_a_full_disk_is_said_to_be_before_the_first_step(tmp_path: Path, engine: Engine) -> None:
    with small_tmpfs(tmp_path, 4 * file_bytes(SIZE)) as disk, opened(disk, engine) as folder:
        with pytest.raises(DoesNotFit, match=r"needs 99,999,999 bytes more there, and \d\d,\d{3},\d{3} are free"):
            folder.reserve(99_999_999)
        files = [written(folder, seed=seed) for seed in range(3)]
        folder.reserve(SIZE - BLOCK_BYTES)
        with pytest.raises(DoesNotFit, match=r"Fix: free space there, or set offload\.dir"):
            folder.create(2 * SIZE)
        assert all(torch.equal(read(file), pages(SIZE, seed)) for seed, file in enumerate(files))
        assert len(list(folder.path.glob("*.tier"))) == 3, "what did not fit is not left in part"


def test_a_disk_without_room_for_a_second_version_keeps_the_first(tmp_path: Path, engine: Engine) -> None:
    with small_tmpfs(tmp_path, 3 * file_bytes(SIZE) // 2) as disk, opened(disk, engine) as folder:
        file = written(folder)
        pin = file.pin()
        for _ in range(2):
            with pytest.raises(DoesNotFit, match="bytes more there"):
                file.write(pages(SIZE, 2))
            assert torch.equal(read(file), pages(SIZE, 1))
        pin.release()
        file.write(pages(SIZE, 2)).wait()
        assert torch.equal(read(file), pages(SIZE, 2))


def test_a_limit_on_the_size_of_files_is_named(folder: TierFolder) -> None:
    with disk_full_after(SIZE // 2), pytest.raises(OffloadError, match=r"File too large\. Fix: .*ulimit -f"):
        folder.create(SIZE)
    assert list(folder.path.iterdir()) == [folder.path / LOCK]


def test_a_disk_that_fails_to_write_spoils_what_was_being_written_alone(tmp_path: Path, engine: Engine) -> None:
    with thin_disk(tmp_path, 4 * SIZE) as (disk, _), opened(disk, engine) as folder:
        file = written(folder)
        pin = file.pin()
        lost = folder.create(4 * SIZE)
        transfer = lost.write(pages(4 * SIZE, 2))
        with pytest.raises(OffloadError, match=rf"cannot write \d+ bytes at \d+: {NO_ROOM}\. Fix: "):
            transfer.wait()
        with pytest.raises(OffloadError, match=NO_ROOM):
            lost.read(pages(4 * SIZE))
        with pytest.raises(OffloadError, match=NO_ROOM):
            list(lost.pin().read())
        assert torch.equal(read(file), pages(SIZE, 1))
        pin.release()


def test_a_disk_that_fails_to_read_is_said_to(tmp_path: Path, engine: Engine) -> None:
    with thin_disk(tmp_path, 32 * SIZE) as (disk, backing), opened(disk, engine) as folder:
        file = written(folder)
        os.truncate(backing, PAGE_BYTES)
        with pytest.raises(OffloadError, match=r"cannot read \d+ bytes at \d+: Input/output error\. Fix: see .*dmesg"):
            read(file)
        os.truncate(backing, 64 << 20)


@pytest.mark.parametrize("position", [0, BLOCK_BYTES - 1, BLOCK_BYTES, SIZE - 1])
def test_one_flipped_bit_is_found(position: int, folder: TierFolder) -> None:
    file = written(folder)
    flip(file_of(folder), HEADER_BYTES + position, 0x10)
    begin = position // BLOCK_BYTES * BLOCK_BYTES
    with pytest.raises(OffloadError, match=rf"bytes {begin} to \d+ of the data are not those that were written"):
        read(file)
    flip(file_of(folder), HEADER_BYTES + position, 0x10)
    assert torch.equal(read(file), pages(SIZE, 1))


def test_an_older_version_in_place_of_the_newest_is_found(folder: TierFolder) -> None:
    """A disk that loses a write gives back what was there before: sound once, and wrong now."""
    file = written(folder)
    old = file_of(folder).read_bytes()
    file.write(pages(SIZE, 2)).wait()
    with file_of(folder).open("r+b") as stream:
        stream.write(old)
    with pytest.raises(OffloadError, match="are not those that were written"):
        read(file)


@pytest.mark.parametrize("length", [0, HEADER_BYTES + 5, HEADER_BYTES + BLOCK_BYTES, HEADER_BYTES + SIZE - 1])
def test_a_file_that_was_cut_is_said_to_be(length: int, folder: TierFolder) -> None:
    file = written(folder)
    os.truncate(file_of(folder), length)
    with pytest.raises(OffloadError, match="something has cut it"):
        read(file)
    file.write(pages(SIZE, 2)).wait()
    assert torch.equal(read(file), pages(SIZE, 2)), "the next version is whole"


def remove_files(folder: TierFolder) -> None:
    for path in folder.path.glob("*.tier"):
        path.unlink()


def remove_folder(folder: TierFolder) -> None:
    shutil.rmtree(folder.path)


@pytest.mark.parametrize("remove", [remove_files, remove_folder])
def test_files_that_are_removed_are_missed_at_the_next_write(
    remove: Callable[[TierFolder], None], folder: TierFolder, tmp_path: Path
) -> None:
    file = written(folder)
    pin = file.pin()
    os.link(pin.path, tmp_path / "kept")
    file.write(pages(SIZE, 2)).wait()
    remove(folder)
    assert torch.equal(read(file), pages(SIZE, 2)), "this process still has it open"
    for action in (lambda: file.write(pages(SIZE, 3)), file.pin):
        with pytest.raises(OffloadError, match=r"somebody has removed it\. Fix: leave offload\.dir alone .* resume"):
            action()
    if remove is remove_folder:
        with pytest.raises(OffloadError, match="No such file or directory"):
            folder.create(SIZE)
        with pytest.raises(OffloadError, match="No such file or directory"):
            folder.reserve(SIZE)
    kept = (tmp_path / "kept").read_bytes()[HEADER_BYTES : HEADER_BYTES + SIZE]
    assert kept == bytes(pages(SIZE, 1).numpy())
    pin.release()
    folder.close()


def test_a_removed_spare_leaves_the_newest_version_the_newest(folder: TierFolder) -> None:
    file = written(folder)
    pin = file.pin()
    file.write(pages(SIZE, 2)).wait()
    pin.release()
    pin.path.unlink()
    file.pin()
    with pytest.raises(OffloadError, match="somebody has removed it"):
        file.write(pages(SIZE, 3))
    assert torch.equal(read(file), pages(SIZE, 2))


def test_a_file_system_without_direct_io_serves_and_says_so(
    tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with mounted("ramfs", "none", tmp_path / "ramfs") as disk, opened(disk, engine) as folder:
        assert folder.reason_not_direct == "the file system refuses O_DIRECT (Invalid argument)"
        file = written(folder)
        assert torch.equal(read(file), pages(SIZE, 1))
        flip(file_of(folder), HEADER_BYTES)
        with pytest.raises(OffloadError, match="not those that were written"):
            read(file)
        written(folder)
        assert caplog.text.count("refuses O_DIRECT") == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, engine: Engine) -> None:
    (tmp_path / "file").write_text("x")
    for place, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        with pytest.raises(OffloadError, match=rf"offload\.dir={place}: cannot be used: {reason}\. Fix: set off"):
            TierFolder(place, engine, "rank0")
    with mounted("tmpfs", "none", tmp_path / "mount", "ro") as place, pytest.raises(OffloadError, match="Read-only"):
        TierFolder(place, engine, "rank0")


def write_for_ever(parent: Path, seed: int, ready: Connection) -> None:
    """Reads and writes, pins and links, and tells of any version that is not the one it wrote."""
    engine = Engine(num_threads=3)
    folder = TierFolder(parent, engine, f"rank{seed}")
    files = [folder.create(SIZE) for _ in range(3)]
    data = pages(SIZE, seed)
    ready.send(str(folder.path))
    while True:
        for file in files:
            if file.has_data:
                assert torch.equal(read(file), data)
                pin = file.pin()
                file.write(data)
                pin.release()
            else:
                file.write(data)


def start_writer(parent: Path, seed: int) -> tuple[CONTEXT.Process, Path]:  # type: ignore[name-defined]
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=write_for_ever, args=(parent, seed, sender))
    process.start()
    sender.close()
    return process, Path(receiver.recv())


def test_a_killed_process_leaves_nothing_that_the_next_does_not_remove(tmp_path: Path) -> None:
    """Two runs share a folder; one is killed again and again in the middle of its writes."""
    randomness = random.Random(0)
    other, others_folder = start_writer(tmp_path, 1)
    left: Path | None = None
    try:
        for _ in range(6):
            process, path = start_writer(tmp_path, 0)
            assert left is None or not left.exists(), "the killed process's"
            time.sleep(randomness.uniform(0, 0.2))
            assert process.is_alive() and process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert path.exists()
            left = path
        assert other.is_alive() and others_folder.exists()
        assert {others_folder, left} == set(tmp_path.iterdir())
    finally:
        other.kill()
        other.join()


def test_many_processes_may_start_at_once(tmp_path: Path) -> None:
    """Each removes what the dead have left, and none takes a folder that another is just making for that."""
    for number in range(20):
        dead = tmp_path / f"rank{number}.{number:016x}"
        dead.mkdir()
        (dead / LOCK).touch()
        (dead / "0.tier").write_bytes(b"x")
    started = []
    try:
        started = [start_writer(tmp_path, seed) for seed in range(4)]
        assert {path for _, path in started} == set(tmp_path.iterdir())
        assert all(process.is_alive() for process, _ in started)
    finally:
        for process, _ in started:
            process.kill()
            process.join()
