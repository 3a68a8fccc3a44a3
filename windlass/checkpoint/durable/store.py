"""The durable tier: chunks of state in a folder or an object store, and the manifests that make checkpoints of them.

    chunks/<sha256>.safetensors      written once, named by many checkpoints, never changed
    step-00000300/manifest.json      written when all its chunks are there: the commit
    latest.json                      the pointer to the newest manifest, written last

Any rank or agent puts chunks; one then commits. A kill at any moment leaves what was committed before as it was, and at
worst chunks that no manifest names. One save at a time: who commits, and deletes, knows that nobody else is writing.
Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from windlass.checkpoint.durable.chunk_file import FOLDER, chunk_name, chunk_of, chunks_named_in, open_chunk, preamble
from windlass.checkpoint.durable.manifest import (
    MANIFEST,
    RUN,
    Manifest,
    StoredFragment,
    StoredTensor,
    step_folder,
    step_name,
    step_of,
    steps_in,
)
from windlass.checkpoint.durable.storage import Location, join, open_storage
from windlass.checkpoint.image import Chunk, Entry, chunks_from_json, chunks_to_json
from windlass.errors import RunFolderError, StaleWriter, WindlassError
from windlass.os_errors import remedy, said
from windlass.untrusted import Malformed, convert, parse_json

POINTER = "latest.json"
FENCE = "generation"
JOB = "job"
STEP_PREFIX = "step-"
GENERATION = re.compile(rb"[0-9]{1,15}")
MAX_SMALL_BYTES = 4096
"""The largest size of the pointer, the fence and the identity."""


@dataclass(frozen=True)
class Pointer:
    """The content of `latest.json`."""

    step: int
    folder: str
    sha256: str
    """The manifest's."""

    def to_bytes(self) -> bytes:
        return json.dumps(vars(self)).encode()


KEEP_ALL = "keep_all"
"""In a checkpoint's `info`: no older one is to be deleted for it."""


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk that is in the store."""

    sha256: str
    size: int
    """The file's, in bytes."""
    written: bool
    """False if it was there already."""
    entries: tuple[Entry, ...]
    """Where its blocks are, from the start of the file."""

    def to_json(self) -> dict[str, Any]:
        (entries,) = chunks_to_json([Chunk(self.entries)])
        return {"sha256": self.sha256, "size": self.size, "written": self.written, "entries": entries}

    @staticmethod
    def from_json(document: dict[str, Any]) -> WrittenChunk:
        (chunk,) = chunks_from_json([document["entries"]])
        return WrittenChunk(document["sha256"], document["size"], document["written"], chunk.entries)


class DurableStore:
    """The checkpoints of one run, in one place that all its writers see.

    Args:
        location: a local folder or an fsspec URL.

    Raises:
        RunFolderError: from every method, where the disk or the store is full, fails or refuses.
    """

    def __init__(self, location: Location) -> None:
        self.storage = open_storage(location)

    @property
    def location(self) -> Location:
        return self.storage.location

    def open_for_writing(self) -> None:
        """Makes the place, removes what a killed writer left half done, and ends a commit that lacks its pointer.

        Chunks that no manifest names stay until `retain`: the run is about to compute many of them again.
        """
        with self._disk_errors():
            self.storage.make()
            steps = steps_in(self.storage)
            if steps and self._pointed_step() != steps[-1] and self._is_own(steps[-1]):
                self._point_to(step_name(steps[-1]))

    def put_chunk(self, chunk: Chunk, data: memoryview) -> WrittenChunk:
        """Writes a chunk, unless it is there. From any process.

        Args:
            data: the bytes of `chunk`, contiguous. Where they begin at a page of memory they are not copied.
        """
        head = preamble(chunk.entries)
        digest = hashlib.sha256(head)
        digest.update(data)
        sha256, size = digest.hexdigest(), len(head) + data.nbytes
        with self._disk_errors():
            is_there = self.storage.size(chunk_name(sha256)) == size
            if not is_there:
                self.storage.write(chunk_name(sha256), [head, data])
        shift = len(head) - chunk.begin
        entries = tuple(replace(entry, begin=entry.begin + shift) for entry in chunk.entries)
        return WrittenChunk(sha256, size, not is_there, entries)

    def put_file(
        self, path: Path, read: Callable[[], Iterable[memoryview]], entries: tuple[Entry, ...]
    ) -> WrittenChunk:
        """Gives a file that is a chunk as it is a name here too, or copies it where that cannot be. From any process.

        Args:
            path: of the file. It must never change again if it has another name.
            read: its bytes in parts, of which the next may replace the one before; called twice for a copy.
            entries: the blocks in it, from the start of the file.
        """
        digest, size = hashlib.sha256(), 0
        for part in read():
            digest.update(part)
            size += part.nbytes
        sha256 = digest.hexdigest()
        with self._disk_errors():
            is_there = self.storage.size(chunk_name(sha256)) == size
            if not is_there and not self.storage.adopt(chunk_name(sha256), path):
                copy, done = memoryview(mmap.mmap(-1, size)), 0
                for part in read():
                    copy[done : done + part.nbytes] = part
                    done += part.nbytes
                self.storage.write(chunk_name(sha256), [copy])
        return WrittenChunk(sha256, size, not is_there, entries)

    def commit(
        self, step: int, generation: int, world_size: int, objects: dict[str, Any], written: Sequence[WrittenChunk]
    ) -> Manifest:
        """Makes a checkpoint of the chunks that all ranks put. From one process.

        A checkpoint of the same step, of an older timeline, is set aside as superseded.

        Args:
            generation: of the writer; see `fence`.
            objects: JSON state.

        Raises:
            StaleWriter: a later generation has fenced this one off.
            RunFolderError: also where a chunk is gone again: another writer took it for a leftover.
            ValueError: the chunks do not make up whole tensors.
        """
        manifest = Manifest(step, generation, world_size, time.time(), objects, *_index(written), run=self.job_id())
        problem = next(manifest.problems(), None)
        if problem is not None:
            raise ValueError(f"the chunks make no checkpoint: {problem}")
        text, name = manifest.to_bytes(), f"{step_name(step)}/{MANIFEST}"
        with self._disk_errors():
            self._check_present(manifest)
            self._check_generation(generation)
            if self.storage.size(name) is not None:
                superseded = self._copy_aside(step, "superseded")
                self._point_to(superseded)  # not to the name whose bytes are about to change
            self.storage.write(name, [text], guard=lambda: self._check_generation(generation))
            try:
                self._check_generation(generation)  # a store checks and writes in two calls
            except StaleWriter:
                if self.storage.read(name) == text:
                    self.storage.delete([name])
                raise
            self._point_to(step_name(step))
        return manifest

    def retain(self, keep: int) -> None:
        """Deletes all but the newest `keep` checkpoints, and then the chunks that no manifest names; 0 keeps all.

        What the pointer names is kept, and so are the chunks of checkpoints that were set aside.
        """
        if keep == 0:
            return
        with self._disk_errors():
            for step in steps_in(self.storage)[:-keep]:
                if step != self._pointed_step():
                    self._delete_step(step_name(step))
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Deletes chunks that no manifest names, sound or damaged, committed or set aside, and half-written files."""
        with self._disk_errors():
            self.storage.make()
            named: set[str] = set()
            for folder in self._step_folders():
                try:
                    named |= chunks_named_in(self.storage.read(f"{folder}/{MANIFEST}"))
                except (FileNotFoundError, NotADirectoryError):
                    if step_of(folder) is not None:  # deleting or writing it was cut off
                        self._delete_step(folder)
            chunks = ((name, chunk_of(name)) for name in self.storage.list(FOLDER))
            self.storage.delete([name for name, sha256 in chunks if sha256 is not None and sha256 not in named])

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        with self._disk_errors():
            return steps_in(self.storage)

    def latest_step(self) -> int | None:
        """The step that the pointer names, without a listing; the newest manifest's if the pointer is damaged."""
        with self._disk_errors():
            step = self._pointed_step()
            if step is not None:
                return step
            steps = steps_in(self.storage)
            return steps[-1] if steps else None

    def set_aside(self, step: int, why: str) -> str:
        """Renames the checkpoint of `step`, so that nobody resumes from it, and returns its new name.

        Args:
            why: what the name then ends with: `damaged` or `superseded`.
        """
        old = step_name(step)
        with self._disk_errors():
            names = self.storage.list(old)
            if not names:
                return old
            if f"{old}/{MANIFEST}" not in names:
                new = self._free_name(f"{old}.{why}")
            else:
                new = self._copy_aside(step, why)
                others = [other for other in steps_in(self.storage) if other != step]
                self._point_to(step_name(others[-1]) if others else new)
                self.storage.delete([f"{old}/{MANIFEST}"])
            for name in names:
                if name != f"{old}/{MANIFEST}":
                    self.storage.move(name, new + name.removeprefix(old))
        return new

    def set_damaged_chunks_aside(self, step: int, part: int = 0, num_parts: int = 1) -> list[str]:
        """Renames the chunks of a damaged checkpoint that are damaged, and returns their new names.

        Left where they are they would be found there, and not written again, by the next save of the same bytes. Reads
        all chunks: ranks may share the work.

        Args:
            part: of the chunks, which are cut into `num_parts`.
        """
        moved = []
        with self._disk_errors():
            try:
                named = sorted(chunks_named_in(self.storage.read(f"{step_name(step)}/{MANIFEST}")))
            except FileNotFoundError:
                return []
            for sha256 in named[part::num_parts]:
                try:
                    open_chunk(self.storage, sha256)
                except FileNotFoundError:
                    continue
                except ValueError:
                    moved.append(self._free_name(f"{chunk_name(sha256)}.damaged"))
                    self.storage.move(chunk_name(sha256), moved[-1])
        return moved

    def restorable_steps(self) -> list[int]:
        """The committed steps, oldest first, and the pointer's: one whose manifest is lost is damage, not absence."""
        with self._disk_errors():
            steps = set(steps_in(self.storage))
            if (pointer := self._pointer()) is not None and pointer.folder == step_name(pointer.step):
                steps.add(pointer.step)
            return sorted(steps)

    def job_id(self) -> str:
        """The run that has its checkpoints here: manifests say it, and agents know the run by it.

        Random, and written at the first call. Where the file is lost, the newest checkpoint still says it.
        """
        with self._disk_errors():
            written = self._written_job()
            if written is not None:
                return written
            identity = self._job_of_manifests() or secrets.token_hex(8)
            self.storage.write(JOB, [identity.encode()])
            return identity

    def other_run(self, manifest: Manifest) -> str | None:
        """Says, as a clause, that a checkpoint in this place is another run's; None if nothing tells that it is."""
        with self._disk_errors():
            own = self._written_job() or self._job_of_manifests()
        if not manifest.run or own is None or manifest.run == own:
            return None
        return f"is a checkpoint of another run ({manifest.run}) than the folder that it is in ({own})"

    def _written_job(self) -> str | None:
        try:
            text = self.storage.read(JOB, MAX_SMALL_BYTES).decode("ascii", "replace")
        except FileNotFoundError:
            return None
        return text if RUN.fullmatch(text) else None

    def _job_of_manifests(self) -> str | None:
        for step in reversed(steps_in(self.storage)):
            try:
                run = Manifest.read(step_folder(self.location, step)).run
            except WindlassError:
                continue
            if run:
                return run
        return None

    def _is_own(self, step: int) -> bool:
        try:
            return self.other_run(Manifest.read(step_folder(self.location, step))) is None
        except WindlassError:
            return False

    def generation(self) -> int:
        """The newest attempt of the run that has begun; 0 before the first."""
        with self._disk_errors():
            return self._fenced_generation()

    def fence(self, generation: int) -> None:
        """Refuses commits of older generations from now on.

        Raises:
            StaleWriter: a later generation was here already.
        """
        with self._disk_errors():
            self._check_generation(generation)
            self.storage.write(FENCE, [str(generation).encode()])

    def _check_generation(self, generation: int) -> None:
        newest = self._fenced_generation()
        if newest > generation:
            raise StaleWriter(
                "checkpoint.dir",
                self.location,
                f"takes no checkpoint of generation {generation} any more: the run goes on in generation {newest}",
                "let this process end; the run was started again without it",
            )

    def _fenced_generation(self) -> int:
        try:
            text = self.storage.read(FENCE, MAX_SMALL_BYTES)
        except FileNotFoundError:
            return 0
        except Malformed:
            text = b""
        if not GENERATION.fullmatch(text):
            raise RunFolderError(
                "checkpoint.dir",
                join(self.location, FENCE),
                "does not say which generation of the run may write",
                "delete that file if no other process of this run is alive",
            )
        return int(text)

    def _check_present(self, manifest: Manifest) -> None:
        missing = {chunk_name(sha256) for sha256 in manifest.chunks} - set(self.storage.list(FOLDER))
        if missing:
            raise RunFolderError(
                "checkpoint.dir",
                self.location,
                f"has lost {len(missing)} chunks before they were committed, such as {min(missing)}",
                "see that no other process writes or cleans up there; nothing that was committed is touched",
            )

    def _copy_aside(self, step: int, why: str) -> str:
        """Gives the manifest of `step` a second name: the pointer needs one that resolves while the first changes."""
        new = self._free_name(f"{step_name(step)}.{why}")
        self.storage.write(f"{new}/{MANIFEST}", [self.storage.read(f"{step_name(step)}/{MANIFEST}")])
        return new

    def _point_to(self, folder: str) -> None:
        sha256 = hashlib.sha256(self.storage.read(f"{folder}/{MANIFEST}")).hexdigest()
        step = step_of(folder.partition(".")[0])
        assert step is not None
        self.storage.write(POINTER, [Pointer(step, folder, sha256).to_bytes()])

    def _pointer(self) -> Pointer | None:
        """Reads `latest.json`; None if it is missing or damaged."""
        try:
            text = self.storage.read(POINTER, MAX_SMALL_BYTES)
            pointer = convert(parse_json(text), Pointer)
        except (FileNotFoundError, Malformed):
            return None
        is_sound = step_of(pointer.folder.partition(".")[0]) == pointer.step and pointer.to_bytes() == text
        return pointer if is_sound else None

    def _pointed_step(self) -> int | None:
        """The step of the checkpoint that the pointer names; None if it names none, or not the one that is there."""
        pointer = self._pointer()
        if pointer is None or pointer.folder != step_name(pointer.step):
            return None
        try:
            manifest = self.storage.read(f"{pointer.folder}/{MANIFEST}")
        except FileNotFoundError:
            return None
        return pointer.step if hashlib.sha256(manifest).hexdigest() == pointer.sha256 else None

    def _step_folders(self) -> list[str]:
        """Also those that were set aside, or that a user has renamed in that way."""
        return [name for name in self.storage.list() if name.startswith(STEP_PREFIX)]

    def _delete_step(self, folder: str) -> None:
        manifest = f"{folder}/{MANIFEST}"
        others = [name for name in self.storage.list(folder) if name != manifest]
        self.storage.delete([manifest])  # first, so that no kill leaves half a checkpoint under a committed name
        self.storage.delete(others)

    def _free_name(self, name: str) -> str:
        number, found = 1, name
        while self.storage.size(found) is not None or self.storage.list(found):
            number += 1
            found = f"{name}{number}"
        return found

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns the error of a disk that is full or refuses into a `RunFolderError` that names the place."""
        try:
            yield
        except OSError as error:
            raise RunFolderError(
                "checkpoint.dir",
                self.location,
                f"cannot take the checkpoint: {said(error)}",
                remedy(error, "make room or choose another checkpoint.dir")
                + "; the checkpoints that are there are intact, and the same command resumes from the newest",
            ) from error
        except Malformed as error:
            raise RunFolderError(
                "checkpoint.dir", self.location, f"holds a file that no run writes: {error}", "move it away"
            ) from error


def _index(written: Sequence[WrittenChunk]) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """A manifest's tensors and chunks."""
    tensors: dict[str, StoredTensor] = {}
    for chunk in written:
        for entry in chunk.entries:
            spec = entry.spec
            tensor = tensors.setdefault(spec.name, StoredTensor(spec.global_shape, spec.dtype))
            tensor.fragments.append(
                StoredFragment(chunk.sha256, spec.name, entry.begin, entry.end, spec.offset, spec.shape)
            )
    return tensors, {chunk.sha256: chunk.size for chunk in written}
