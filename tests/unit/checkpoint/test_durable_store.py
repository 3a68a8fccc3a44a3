"""What the durable store promises, whatever is written to it: by a trainer or an agent, to a folder or a store."""

from __future__ import annotations

import errno
import json
import random
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from support.files import disk_full_after, flip, snapshot_of
from support.stored import are_sound, content, expected, image_of, num_chunks, put, save

from windlass.checkpoint import inspect
from windlass.checkpoint.durable import object_storage
from windlass.checkpoint.durable.chunk_file import chunk_name
from windlass.checkpoint.durable.manifest import MANIFEST, Manifest, step_folder, step_name
from windlass.checkpoint.durable.storage import Location
from windlass.checkpoint.durable.store import FENCE, POINTER, DurableStore
from windlass.errors import CorruptCheckpoint, RunFolderError, StaleWriter

SMALL = 5000
"""Bytes a block: all blocks are in one chunk, so that a test has few files."""


@pytest.fixture(params=["folder", "store"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path / "checkpoints" if request.param == "folder" else f"memory://{uuid.uuid4().hex}/checkpoints"


@pytest.fixture
def store(location: Location) -> DurableStore:
    store = DurableStore(location)
    store.open_for_writing()
    return store


@pytest.fixture
def local(tmp_path: Path) -> DurableStore:
    return DurableStore(tmp_path)


def pointer(store: DurableStore) -> dict[str, Any]:
    return json.loads(store.storage.read(POINTER))


def test_an_empty_store_has_nothing(store: DurableStore) -> None:
    assert (store.steps(), store.latest_step(), store.restorable_steps()) == ([], None, [])
    store.retain(1)


def test_what_is_committed_is_read_back(store: DurableStore) -> None:
    save(store, 3, [1, 2, 3])
    save(store, 12, [1, 2, 4], generation=2)
    assert (store.steps(), store.latest_step()) == ([3, 12], 12)
    assert content(store, 3) == expected([1, 2, 3])
    assert content(store, 12) == expected([1, 2, 4])
    manifest = Manifest.read(step_folder(store.location, 12))
    assert (manifest.step, manifest.generation, manifest.objects) == (12, 2, {"versions": [1, 2, 4]})
    assert pointer(store)["folder"] == "step-00000012"


def test_unchanged_chunks_are_not_written_again(store: DurableStore) -> None:
    first = save(store, 1, [0] * 10)
    second = save(store, 2, [0] * 9 + [1])
    assert all(chunk.written for chunk in first)
    first_bytes = sum(chunk.size for chunk in first)
    second_bytes = sum(chunk.size for chunk in second if chunk.written)
    assert 0.1 * first_bytes <= second_bytes <= 0.12 * first_bytes
    newest = inspect.list_checkpoints(store.location)[-1]
    assert newest.num_bytes == first_bytes
    assert newest.shared_bytes == first_bytes - second_bytes
    assert content(store, 2) == expected([0] * 9 + [1])


def test_verify_reads_shared_chunks_once(store: DurableStore) -> None:
    save(store, 1, [0] * 4)
    save(store, 2, [0] * 3 + [1])
    first, second = inspect.verify(store.location)
    assert first.num_read_bytes == first.num_bytes == second.num_bytes
    assert 4 * second.num_read_bytes == pytest.approx(second.num_bytes, rel=0.01)
    (alone,) = inspect.verify(step_folder(store.location, 2))
    assert alone.num_read_bytes == second.num_bytes


def test_retention_deletes_what_nothing_names(store: DurableStore) -> None:
    for step in range(1, 5):
        save(store, step, [0, 0, step])
    assert num_chunks(store) == 6
    store.retain(0)
    assert num_chunks(store) == 6, "0 keeps all"
    store.retain(2)
    assert store.steps() == [3, 4]
    assert num_chunks(store) == 4
    put(store, [7, 8, 9])  # and then it was killed
    store.retain(2)
    assert num_chunks(store) == 4
    assert are_sound(store.location)


def test_retention_keeps_what_the_pointer_names(store: DurableStore) -> None:
    """A writer that was killed between manifest and pointer left them apart."""
    save(store, 1, [1], num_bytes=SMALL)
    before = store.storage.read(POINTER)
    save(store, 2, [2], num_bytes=SMALL)
    store.storage.write(POINTER, [before])
    store.retain(1)
    assert (store.steps(), store.latest_step()) == ([1, 2], 1)
    store.open_for_writing()
    assert store.latest_step() == 2
    store.retain(1)
    assert store.steps() == [2]


@pytest.mark.parametrize("why", ["damaged", "superseded"])
def test_what_is_set_aside_keeps_its_chunks(why: str, store: DurableStore) -> None:
    for step in (1, 2):
        save(store, step, [0, step])
    assert store.set_aside(2, why) == f"step-00000002.{why}"
    assert (store.steps(), store.latest_step()) == ([1], 1)
    save(store, 2, [0, 5], keep=1)
    assert store.set_aside(2, why) == f"step-00000002.{why}2"
    save(store, 3, [0, 6], keep=1)
    assert store.steps() == [3]
    assert num_chunks(store) == 1 + 3
    for number, version in (("", 2), ("2", 5)):
        (result,) = inspect.verify(f"{store.location}/step-00000002.{why}{number}")
        assert result.is_sound
        text = store.storage.read(f"step-00000002.{why}{number}/{MANIFEST}")
        assert Manifest.parse(text, "").objects == {"versions": [0, version]}


def test_a_damaged_manifest_still_protects_its_chunks(local: DurableStore, tmp_path: Path) -> None:
    save(local, 1, [1, 1])
    save(local, 2, [2, 2])
    path = tmp_path / step_name(1) / MANIFEST
    text = path.read_bytes()
    chunk = next(iter(Manifest.parse(text, "").chunks)).encode()
    path.write_bytes(text.replace(chunk, b"g" + chunk[1:], 1))
    local.set_aside(1, "damaged")
    local.retain(1)
    assert num_chunks(local) == 4


def test_a_step_of_an_older_timeline_is_superseded(store: DurableStore) -> None:
    save(store, 1, [1], num_bytes=SMALL)
    save(store, 1, [2], num_bytes=SMALL)
    assert store.steps() == [1]
    assert content(store, 1) == expected([2], SMALL)
    assert store.storage.size(f"step-00000001.superseded/{MANIFEST}") is not None
    assert pointer(store)["folder"] == "step-00000001"


def test_the_pointer_resolves_at_every_moment(local: DurableStore, tmp_path: Path) -> None:
    """After every single change of a name, and so after a kill at any moment."""
    storage = local.storage
    seen: list[str] = []

    def check() -> None:
        assert max(local.steps()) >= max([int(name[5:13]) for name in seen], default=0), "no step is lost on the way"
        said = local._pointer()
        assert said is not None
        assert Manifest.parse(storage.read(f"{said.folder}/{MANIFEST}"), "").step == said.step
        seen.append(said.folder)

    class Watched:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **more: Any) -> Any:
                result = getattr(storage, name)(*arguments, **more)
                if name in ("write", "delete", "move"):
                    check()
                return result

            return call

    save(local, 1, [1], num_bytes=SMALL)
    local.storage = Watched()  # type: ignore[assignment]
    save(local, 1, [2], num_bytes=SMALL)
    save(local, 2, [3], num_bytes=SMALL)
    save(local, 3, [4], num_bytes=SMALL, keep=1)
    local.storage = storage
    assert set(seen) == {"step-00000001", "step-00000001.superseded", "step-00000002", "step-00000003"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [POINTER, MANIFEST])
def test_a_changed_bit_of_pointer_or_manifest_is_noticed(name: str, local: DurableStore, tmp_path: Path) -> None:
    save(local, 1, [1], num_bytes=SMALL)
    save(local, 2, [1], num_bytes=SMALL)
    path = tmp_path / name if name == POINTER else tmp_path / step_name(2) / name
    for position in range(path.stat().st_size):
        for bit in range(8):
            flip(path, position, 1 << bit)
            assert local._pointed_step() is None, (position, bit)
            assert local.latest_step() == 2, "the newest manifest then"
            if name == MANIFEST and bit == position % 8:
                with pytest.raises(CorruptCheckpoint):
                    Manifest.read(tmp_path / step_name(2))
            flip(path, position, 1 << bit)
    assert local._pointed_step() == 2
    path.unlink()
    assert local.latest_step() == (2 if name == POINTER else 1)


def test_changed_bits_of_chunks_are_found_and_set_aside(local: DurableStore, tmp_path: Path) -> None:
    randomness = random.Random(5)
    written = save(local, 1, [1, 2, 3, 4])
    for number, chunk in enumerate(written):
        path = tmp_path / chunk_name(chunk.sha256)
        flip(path, randomness.randrange(chunk.size), 1 << randomness.randrange(8))
        (result,) = inspect.verify(tmp_path)
        assert len(result.problems) == number + 1
    damaged = {chunk.sha256: (tmp_path / chunk_name(chunk.sha256)).read_bytes() for chunk in written}
    moved = [name for part in range(3) for name in local.set_damaged_chunks_aside(1, part, 3)]
    assert sorted(moved) == sorted(f"{chunk_name(chunk.sha256)}.damaged" for chunk in written)
    for sha256, data in damaged.items():
        assert (tmp_path / f"{chunk_name(sha256)}.damaged").read_bytes() == data, "it is there to be looked at"
    assert {chunk.written for chunk in put(local, [1, 2, 3, 4])} == {True}
    assert are_sound(tmp_path)


def test_a_torn_chunk_is_written_again(local: DurableStore, tmp_path: Path) -> None:
    (chunk,) = put(local, [1], SMALL)
    (tmp_path / chunk_name(chunk.sha256)).write_bytes(b"torn")
    (again,) = put(local, [1], SMALL)
    assert again.written
    assert (tmp_path / chunk_name(chunk.sha256)).stat().st_size == chunk.size


@pytest.mark.parametrize("room", [0, 100, 8000, 3 << 20, (3 << 20) + 5000])
def test_a_full_disk_leaves_all_earlier_checkpoints(room: int, local: DurableStore, tmp_path: Path) -> None:
    save(local, 1, [1, 1])
    before = snapshot_of(tmp_path)
    with pytest.raises(RunFolderError, match="make room"), disk_full_after(room):
        save(local, 2, [1, 2], num_bytes=(3 << 20) + 4096)
    assert are_sound(tmp_path)
    local.remove_leftovers()
    assert snapshot_of(tmp_path) == before


@pytest.mark.parametrize("name", [MANIFEST, POINTER])
def test_a_disk_that_fills_at_the_commit(name: str, local: DurableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(local, 1, [1])
    write = local.storage.write

    def full(what: str, *arguments: Any, **more: Any) -> None:
        if what.endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(what, *arguments, **more)

    monkeypatch.setattr(local.storage, "write", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        save(local, 2, [2])
    monkeypatch.undo()
    assert pointer(local)["step"] == 1
    assert are_sound(local.location)
    assert local.steps() == ([1] if name == MANIFEST else [1, 2]), "the manifest is the commit"
    local.open_for_writing()
    assert local.latest_step() == local.steps()[-1]


def test_a_commit_without_all_chunks_is_refused(store: DurableStore) -> None:
    written = put(store, [1, 2])
    with pytest.raises(ValueError, match="w1"):
        partial = [chunk for chunk in written if chunk.entries[0].spec.name == "w0"]
        block = written[1].entries[0]
        half = type(block)(type(block.spec)("w1", "uint8", (3 << 20,), (0,), (5,)), block.begin)
        store.commit(1, 0, 1, {}, [*partial, type(written[1])(written[1].sha256, written[1].size, True, (half,))])
    store.remove_leftovers()  # by somebody who thinks that nobody is writing
    with pytest.raises(RunFolderError, match="has lost 2 chunks"):
        store.commit(1, 0, 1, {}, written)
    assert store.steps() == []


def test_a_fence_keeps_older_generations_out(store: DurableStore) -> None:
    save(store, 1, [1], num_bytes=SMALL)
    store.fence(2)
    with pytest.raises(StaleWriter, match="generation 1 any more: the run goes on in generation 2"):
        save(store, 2, [2], num_bytes=SMALL, generation=1)
    assert (store.steps(), store.latest_step()) == ([1], 1)
    save(store, 2, [2], num_bytes=SMALL, generation=2)
    save(store, 3, [3], num_bytes=SMALL, generation=3)
    with pytest.raises(StaleWriter):
        store.fence(1)
    store.fence(2)
    assert store.storage.read(FENCE) == b"2"
    store.storage.write(FENCE, [b"\xff"])
    with pytest.raises(RunFolderError, match="does not say which generation"):
        save(store, 4, [4], num_bytes=SMALL, generation=9)


@pytest.mark.parametrize("moment", ["before the manifest's name", "after it"])
def test_a_writer_that_stops_in_its_commit_is_fenced_off(
    moment: str, location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on after the run was started again without it, which it cannot know."""
    old, new = DurableStore(location), DurableStore(location)
    save(old, 1, [1], num_bytes=SMALL)
    write = old.storage.write

    def slow(name: str, parts: Any, guard: Any = None) -> None:
        if not name.endswith(MANIFEST):
            write(name, parts, guard)
        elif moment == "after it":
            write(name, parts, guard)
            new.fence(1)
        else:
            write(name, parts, lambda: (new.fence(1), guard()))

    monkeypatch.setattr(old.storage, "write", slow)
    with pytest.raises(StaleWriter):
        save(old, 2, [2], num_bytes=SMALL)
    assert (new.steps(), new.latest_step()) == ([1], 1)


class Distant(MemoryFileSystem):
    """A store behind a network: it takes its time, and now and then it does not answer."""

    protocol = "distant"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    randomness = random.Random(0)
    calls: list[tuple[str, str]] = []  # noqa: RUF012

    def pipe_file(self, path: str, value: bytes, **more: Any) -> None:  # type: ignore[override]
        self._travel()
        super().pipe_file(path, value, **more)
        self.calls.append(("write", path))

    def cat_file(self, path: str, **more: Any) -> bytes:  # type: ignore[override]
        self._travel()
        return super().cat_file(path, **more)

    def rm_file(self, path: str) -> None:
        self._travel()
        super().rm_file(path)
        self.calls.append(("delete", path))

    def _travel(self) -> None:
        time.sleep(self.randomness.uniform(0, 0.02))
        if self.randomness.random() < 0.2:
            raise TimeoutError("no answer")


fsspec.register_implementation("distant", Distant, clobber=True)


@pytest.mark.slow
def test_a_slow_store_that_fails_now_and_then_keeps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several writers put chunks at the same time; what names a thing is written after it, and deleted before it."""
    monkeypatch.setattr(object_storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv(object_storage.MORE_SCHEMES, "distant")
    location = f"distant://{uuid.uuid4().hex}"
    store = DurableStore(location)
    store.open_for_writing()
    for step in (1, 2, 3):
        versions = [0, step, step, step]
        written = put_at_once(location, versions)
        store.commit(step, 0, 4, {}, written)
        store.retain(1)
        assert content(store, step) == expected(versions)
    assert store.steps() == [3]
    assert num_chunks(store) == 4
    at = {call: number for number, call in enumerate(Distant.calls)}
    paths = {path for _, path in Distant.calls}
    for step in (1, 2, 3):
        manifest = next(path for path in paths if f"step-0000000{step}/" in path)
        earlier = [
            call for call in Distant.calls[: at["write", manifest]] if call[0] == "write" and "chunks" in call[1]
        ]
        assert len({path for _, path in earlier}) == 4 + 3 * (step - 1)
        if step < 3:
            deleted = [call for call in Distant.calls[: at["delete", manifest]] if call[0] == "delete"]
            assert sum("chunks" in path for _, path in deleted) == 3 * (step - 1)


def put_at_once(location: Location, versions: Sequence[int]) -> list:
    """A writer a chunk, each with a store of its own."""
    written: list = []

    def put_one(chunk: Any, data: memoryview) -> None:
        written.append(DurableStore(location).put_chunk(chunk, data))

    threads = [threading.Thread(target=put_one, args=part) for part in image_of(versions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == len(versions)
    return written


def test_writers_of_the_same_chunk_do_not_disturb_each_other(tmp_path: Path) -> None:
    (part,) = image_of([0])
    start = threading.Barrier(4)
    written = []

    def put_one() -> None:
        store = DurableStore(tmp_path)
        start.wait()
        written.append(store.put_chunk(*part))

    threads = [threading.Thread(target=put_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({chunk.sha256 for chunk in written}) == 1
    assert list(snapshot_of(tmp_path)) == [chunk_name(written[0].sha256)]
    DurableStore(tmp_path).commit(1, 0, 1, {}, written[:1])
    assert are_sound(tmp_path)
