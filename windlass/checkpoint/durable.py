"""The durable tier: fragments to disk and back, in any cut.

Writing: each rank writes and syncs its own file; rank 0 writes the manifest last, syncs the folder and renames it to
`step-N`. A kill at any moment leaves either the whole checkpoint or a `.writing` folder that the next start removes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from windlass.checkpoint import safetensors_file
from windlass.checkpoint.manifest import (
    Manifest,
    StoredFile,
    StoredFragment,
    StoredTensor,
    committed_steps,
    corrupt,
    step_folder,
    unreadable,
)
from windlass.checkpoint.safetensors_file import SafetensorsReader, Stored
from windlass.errors import RunFolderError
from windlass.files import sync_folder
from windlass.parallel.collectives import all_gather_object
from windlass.parallel.fragment import Fragment
from windlass.parallel.mesh import Mesh

UNFINISHED_SUFFIXES = (".writing", ".deleting")


class DurableStore:
    """The checkpoints of one run in one folder that all ranks see."""

    def __init__(self, directory: Path, mesh: Mesh) -> None:
        self.directory, self.mesh = directory, mesh

    def open_for_writing(self) -> None:
        """Makes the folder, and removes what a killed writer left. On rank 0; the run folder is locked by then.

        Raises:
            RunFolderError: the folder cannot be made or written.
        """
        with _disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if path.name.endswith(UNFINISHED_SUFFIXES):
                    shutil.rmtree(path)

    def write(self, step: int, fragments: Iterable[tuple[Fragment, torch.Tensor]], objects: dict[str, Any]) -> Path:
        """Commits a checkpoint of `step`. Collective.

        Args:
            fragments: what this rank has to say: blocks, and the local tensors that hold them.
            objects: JSON state; rank 0's is written.

        Raises:
            RunFolderError: on every rank, if any could not write. Nothing is committed then, and what was committed
                before is as it was.
        """
        final = step_folder(self.directory, step)
        writing = final.with_name(final.name + ".writing")
        self.mesh.agree(lambda: self._prepare(writing))
        try:
            entries = self.mesh.agree(lambda: self._write_rank(writing, fragments))
            entries_of_ranks = all_gather_object(entries, self.mesh.group)
            self.mesh.agree(lambda: self._commit(step, writing, final, entries_of_ranks, objects))
        except Exception:
            if self.mesh.rank == 0:
                shutil.rmtree(writing, ignore_errors=True)
            raise
        return final

    def retain(self, keep: int) -> None:
        """Deletes all but the newest `keep` checkpoints; 0 keeps all. Collective.

        Raises:
            RunFolderError: on every rank, if the folder cannot be written.
        """
        if keep > 0:
            self.mesh.agree(lambda: self._delete_older(keep))

    def _delete_older(self, keep: int) -> None:
        if self.mesh.rank != 0:
            return
        with _disk_errors(self.directory):
            for step in committed_steps(self.directory)[:-keep]:
                folder = step_folder(self.directory, step)
                deleting = folder.with_name(folder.name + ".deleting")
                folder.rename(deleting)  # so that no kill leaves half a checkpoint under a committed name
                shutil.rmtree(deleting)

    def _prepare(self, writing: Path) -> None:
        if self.mesh.rank != 0:
            return
        with _disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if writing.exists():
                shutil.rmtree(writing)
            writing.mkdir()

    def _write_rank(
        self, writing: Path, fragments: Iterable[tuple[Fragment, torch.Tensor]]
    ) -> tuple[str, StoredFile, list[tuple[Fragment, Stored]]]:
        fragments = list(fragments)
        path = writing / f"rank-{self.mesh.rank:05d}.safetensors"
        with _disk_errors(self.directory):
            stored, header_sha256 = safetensors_file.write(path, ((part.name, local) for part, local in fragments))
            file = StoredFile(path.stat().st_size, header_sha256)
        return path.name, file, [(part, entry) for (part, _), entry in zip(fragments, stored, strict=True)]

    def _commit(
        self,
        step: int,
        writing: Path,
        final: Path,
        entries_of_ranks: list[tuple[str, StoredFile, list[tuple[Fragment, Stored]]]],
        objects: dict[str, Any],
    ) -> None:
        if self.mesh.rank != 0:
            return
        tensors: dict[str, StoredTensor] = {}
        for file, _, entries in entries_of_ranks:
            for part, stored in entries:
                tensor = tensors.setdefault(
                    part.name, StoredTensor(part.global_shape, str(part.dtype).removeprefix("torch."))
                )
                tensor.fragments.append(
                    StoredFragment(file=file, offset=part.offset, shape=part.shape, **asdict(stored))
                )
        files = {file: entry for file, entry, _ in entries_of_ranks}
        with _disk_errors(self.directory):
            Manifest(step, self.mesh.world_size, time.time(), objects, tensors, files).write(writing)
            sync_folder(writing)
            writing.rename(final)
            sync_folder(self.directory)


class CheckpointReader:
    """Reads blocks of the tensors of one checkpoint, whatever cut they were written in, and checks every byte read.

    Raises:
        CorruptCheckpoint: from the constructor and from `read`, naming the file and what is wrong with it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._readers: dict[str, SafetensorsReader] = {}

    def read(self, fragment: Fragment, into: torch.Tensor) -> None:
        """Fills the local tensor `into`, which holds `fragment`."""
        stored_tensor = self.manifest.tensors[fragment.name]
        dtype = getattr(torch, stored_tensor.dtype)
        num_read = 0
        for stored in stored_tensor.fragments:
            block = Fragment(fragment.name, stored_tensor.shape, stored.offset, stored.shape, dtype)
            indexes = fragment.overlap(block)
            if indexes is None:
                continue
            mine, theirs = indexes
            source = self._read_stored(stored, dtype)[theirs]
            into[mine].copy_(source)
            num_read += source.numel()
        if num_read != fragment.numel:
            raise corrupt(self.folder, f"{fragment.name} lacks {fragment.numel - num_read} of its elements")

    def read_whole(self, name: str) -> torch.Tensor:
        """The global tensor `name`, on the CPU."""
        stored = self.manifest.tensors[name]
        dtype = getattr(torch, stored.dtype)
        tensor = torch.empty(stored.shape, dtype=dtype)
        self.read(Fragment(name, stored.shape, (0,) * len(stored.shape), stored.shape, dtype), tensor)
        return tensor

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _read_stored(self, stored: StoredFragment, dtype: torch.dtype) -> torch.Tensor:
        try:
            reader = self._readers.get(stored.file)
            if reader is None:
                reader = self._readers[stored.file] = open_checked(self.folder, stored.file, self.manifest)
            return reader.read(Stored(stored.key, stored.begin, stored.end, stored.sha256), dtype, stored.shape)
        except ValueError as error:
            raise corrupt(self.folder, f"{stored.file}: {error}") from error
        except OSError as error:
            raise unreadable(self.folder, stored.file, error) from error


def open_checked(folder: Path, file: str, manifest: Manifest) -> SafetensorsReader:
    """Opens a file of a checkpoint. Raises ValueError if its size or header are not as written."""
    reader = SafetensorsReader(folder / file)
    expected = manifest.files[file]
    if reader.size != expected.size:
        raise ValueError(f"has {reader.size} bytes where {expected.size} were written")
    if reader.header_sha256 != expected.header_sha256:
        raise ValueError("its header has changed")
    return reader


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turns the error of a disk that is full or refuses into a `RunFolderError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            "checkpoint.dir",
            directory,
            f"cannot take the checkpoint: {error.strerror or error}",
            "make room or choose another checkpoint.dir; the checkpoints that are there are intact, and the same "
            "command resumes from the newest",
        ) from error
