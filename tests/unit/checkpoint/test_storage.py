"""Folders and object stores keep the same promises."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.agents import shared_memory
from support.files import disk_full_after, snapshot_of

from windlass.checkpoint.durable import local_storage, object_storage
from windlass.checkpoint.durable.local_storage import DIRECT_MIN_BYTES, LocalStorage
from windlass.checkpoint.durable.object_storage import NUM_TRIES, FsspecStorage
from windlass.checkpoint.durable.storage import Storage, as_location, is_same_place, join, name_of, open_storage, split
from windlass.checkpoint.image import PAGE_BYTES
from windlass.errors import ConfigError, RunFolderError


@pytest.fixture(params=["folder", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    location = tmp_path / "deeper" / "place" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/place"
    storage = open_storage(location)
    storage.make()
    return storage


def test_what_is_written_is_read_in_any_way(storage: Storage) -> None:
    storage.write("folder/name", [b"ab", memoryview(b"cde"), bytearray(b"f")])
    assert storage.read("folder/name") == b"abcdef"
    assert bytes(storage.open("folder/name")) == b"abcdef"
    assert storage.size("folder/name") == 6
    storage.write("folder/name", [b"new"])
    assert storage.read("folder/name") == b"new"


def test_a_file_of_another_name_is_adopted_or_refused(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"new")
    file.chmod(0o600)
    storage.write("folder/name", [b"old"])
    if isinstance(storage, FsspecStorage):
        assert not storage.adopt("folder/name", file)
        assert storage.read("folder/name") == b"old"
        return
    for _ in range(2):  # the second finds it there
        assert storage.adopt("folder/name", file)
        assert storage.read("folder/name") == b"new"
    assert isinstance(storage, LocalStorage)
    path = storage.location / "folder" / "name"
    assert path.samefile(file) and storage.list("folder") == ["folder/name"]
    storage.write("folder/other", [b"x"])
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode, "others may read it, as any file here"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        storage.adopt("folder/name", file)
    assert storage.read("folder/name") == b"new" and storage.list("folder") == ["folder/name", "folder/other"]


def test_a_file_of_another_file_system_is_not_adopted(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "place")
    storage.make()
    with shared_memory() as shm:
        (shm / "file").write_bytes(b"there")
        if (shm / "file").stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("shared memory is on the disk of the tests")
        assert not storage.adopt("name", shm / "file")
    assert storage.list() == []


def test_nothing_is_a_value_too(storage: Storage) -> None:
    storage.write("empty", [])
    assert (storage.read("empty"), bytes(storage.open("empty")), storage.size("empty")) == (b"", b"", 0)


def test_what_is_missing_is_said_to_be(storage: Storage) -> None:
    storage.write("file", [b"x"])
    for name in ("missing", "missing/deeper", "file/deeper"):
        assert storage.size(name) is None
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            storage.read(name)
        storage.delete([name])
    assert storage.list("missing") == []


def test_listing_is_of_one_folder(storage: Storage) -> None:
    for name in ("top", "b/two", "b/one", "a/deep/er"):
        storage.write(name, [b"x"])
    assert storage.list() == ["a", "b", "top"]
    assert storage.list("b") == ["b/one", "b/two"]
    assert storage.list("a") == ["a/deep"]


def test_deleting_empties_and_moving_renames(storage: Storage) -> None:
    for name in ("a/one", "a/two", "b/three"):
        storage.write(name, [name.encode()])
    storage.move("a/one", "a/moved")
    assert storage.list("a") == ["a/moved", "a/two"]
    assert storage.read("a/moved") == b"a/one"
    storage.delete(["a/moved", "a/two"])
    assert storage.list() == ["b"], "nobody sees a folder of nothing"


def test_a_guard_that_objects_leaves_all_as_it_was(storage: Storage) -> None:
    def refuse() -> None:
        raise ZeroDivisionError

    storage.write("name", [b"old"])
    for name in ("name", "other"):
        with pytest.raises(ZeroDivisionError):
            storage.write(name, [b"new"], guard=refuse)
    assert storage.list() == ["name"]
    assert storage.read("name") == b"old"


def test_other_places_do_not_meet(storage: Storage) -> None:
    other = open_storage(join(storage.location, "inner"))
    other.make()
    other.write("name", [b"inner"])
    storage.write("name", [b"outer"])
    assert (other.read("name"), storage.read("inner/name")) == (b"inner", b"inner")


SIZES = [1, PAGE_BYTES, DIRECT_MIN_BYTES - 1, DIRECT_MIN_BYTES, DIRECT_MIN_BYTES + 1, 3 * DIRECT_MIN_BYTES + 5]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("shift", [0, 1, 512], ids=lambda shift: f"{shift} bytes into a page")
def test_files_of_any_size_from_memory_at_any_address(
    direct: bool, shift: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(local_storage, "O_DIRECT", 0)
    monkeypatch.setattr(local_storage, "WRITE_BYTES", 1 << 20)
    storage = LocalStorage(tmp_path)
    pages = mmap.mmap(-1, max(SIZES) + PAGE_BYTES)
    pages[:] = os.urandom(len(pages))
    for number, (head, size) in enumerate(itertools.product((0, 8, PAGE_BYTES), SIZES)):
        parts = [os.urandom(head), memoryview(pages)[shift : shift + size], b"tail" * (number % 2)]
        storage.write("file", parts)
        assert storage.read("file") == b"".join(parts), (head, size)


def test_a_file_system_that_refuses_direct_writes_gets_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags_seen = []
    really_open = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        flags_seen.append(bool(flags & local_storage.O_DIRECT))
        if flags_seen[-1]:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *mode)

    monkeypatch.setattr(local_storage.os, "open", refuse)
    data = os.urandom(DIRECT_MIN_BYTES + 1)
    LocalStorage(tmp_path).write("file", [data])
    assert (tmp_path / "file").read_bytes() == data
    assert flags_seen[:2] == [True, False]


@pytest.mark.parametrize("size", [3000, 2 * DIRECT_MIN_BYTES], ids=["buffered", "direct"])
def test_a_full_disk_changes_nothing(size: int, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("folder/name", [b"old"])
    for room in (0, 1, size // 2, size - 1):
        with pytest.raises(OSError, match="File too large"), disk_full_after(room):
            storage.write("folder/name", [bytes(size)])
        assert snapshot_of(tmp_path) == {"folder/name": b"old"}


def test_making_removes_what_killed_writers_left(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("folder/name", [b"x"])
    (tmp_path / "folder" / "name.12-ab.tmp").write_text("half")
    (tmp_path / "top.12-ab.tmp").write_text("half")
    storage.make()
    assert snapshot_of(tmp_path) == {"folder/name": b"x"}


class Unreliable(MemoryFileSystem):
    """Fails so many times in each call, or for good, before it does what it should."""

    protocol = "unreliable"
    cachable = False
    num_failures = 0
    error: OSError = TimeoutError("no answer")
    log: list[str]

    def _maybe_fail(self, what: str) -> None:
        self.log.append(what)
        if sum(entry == what for entry in self.log) <= self.num_failures:
            raise self.error

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:  # type: ignore[override]
        self._maybe_fail("write")
        super().pipe_file(path, value, **more)

    def cat_file(self, path: str, **more: Any) -> bytes:  # type: ignore[override]
        self._maybe_fail("read")
        return super().cat_file(path, **more)

    def info(self, path: str, **more: Any) -> dict:
        self._maybe_fail("info")
        return super().info(path, **more)

    def ls(self, path: str, detail: bool = True, **more: Any) -> list:
        self._maybe_fail("list")
        return super().ls(path, detail=detail, **more)

    def rm_file(self, path: str) -> None:
        self._maybe_fail("delete")
        super().rm_file(path)


fsspec.register_implementation("unreliable", Unreliable, clobber=True)


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Unreliable]]:
    monkeypatch.setattr(Unreliable, "log", [], raising=False)
    monkeypatch.setattr(Unreliable, "store", {})
    monkeypatch.setattr(Unreliable, "pseudo_dirs", [""])
    monkeypatch.setattr(Unreliable, "num_failures", 0)
    monkeypatch.setenv(object_storage.MORE_SCHEMES, "unreliable")
    yield Unreliable


def everything(storage: Storage) -> None:
    storage.write("a/b", [b"data"])
    assert storage.read("a/b") == b"data"
    assert storage.size("a/b") == 4
    assert storage.list("a") == ["a/b"]
    storage.delete(["a/b"])


@pytest.mark.parametrize("num_failures", [1, NUM_TRIES - 1])
@pytest.mark.parametrize("error", [TimeoutError("no answer"), ConnectionResetError("gone"), OSError("503 slow down")])
def test_a_store_that_fails_a_few_times_is_asked_again(
    num_failures: int, error: OSError, unreliable: type[Unreliable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreliable, "num_failures", num_failures)
    monkeypatch.setattr(unreliable, "error", error)
    waits: list[float] = []
    everything(FsspecStorage("unreliable://place", sleep=waits.append))
    assert len(waits) == 5 * num_failures
    longest = [object_storage.FIRST_WAIT_S * 2**number for number in range(num_failures)]
    for number, wait in enumerate(waits):
        upper = min(longest[number % num_failures], object_storage.MAX_WAIT_S)
        assert upper / 2 <= wait <= upper


def test_a_store_that_never_answers_is_given_up(unreliable: type[Unreliable], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreliable, "num_failures", 10**9)
    waits: list[float] = []
    storage = FsspecStorage("unreliable://place", sleep=waits.append)
    with pytest.raises(RunFolderError, match=r"cannot write a/b: no answer\. Fix: see that the store answers"):
        storage.write("a/b", [b"data"])
    assert unreliable.log == ["write"] * NUM_TRIES
    assert len(waits) == NUM_TRIES - 1


def test_a_store_that_lets_nobody_in_is_not_asked_again(
    unreliable: type[Unreliable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unreliable, "num_failures", 10**9)
    monkeypatch.setattr(unreliable, "error", PermissionError(errno.EACCES, "access denied"))
    waits: list[float] = []
    with pytest.raises(RunFolderError, match="access denied"):
        FsspecStorage("unreliable://place", sleep=waits.append).read("a")
    assert waits == []


def test_a_scheme_that_nothing_serves_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        open_storage("nowhere://bucket/run")


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host/x", "http://host/x", "S3://bucket/x", "://x", "data://x"),
        *(
            "reference::file:///x/refs.json",
            "simplecache::s3://bucket/x",
            "s3://bucket/x::reference://",
            "s3://a/s3://b",
        ),
    ],
)
def test_only_stores_that_are_listed_are_opened_and_no_chains(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsspec, "url_to_fs", lambda *_, **__: pytest.fail("fsspec was asked"))
    with pytest.raises(ConfigError, match="is not a URL of s3://"):
        open_storage(url)


def test_locations_have_one_form(tmp_path: Path) -> None:
    assert as_location("runs/mine") == Path("runs/mine")
    assert as_location("file:///runs/mine") == Path("/runs/mine")
    assert as_location("s3://bucket/run/") == "s3://bucket/run"
    assert join("s3://bucket/run", "step") == "s3://bucket/run/step"
    assert join(tmp_path, "step") == tmp_path / "step"
    assert split("s3://bucket/run/step") == ("s3://bucket/run", "step")
    assert (name_of("s3://bucket/run/step"), name_of(tmp_path / "step")) == ("step", "step")
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_same_place(tmp_path / "link" / "x", str(tmp_path / "y" / ".." / "x"))
    assert not is_same_place("s3://bucket/run", "s3://bucket/other")
    assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)
