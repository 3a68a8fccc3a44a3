"""State without torch, to put into a durable store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from windlass.checkpoint import inspect
from windlass.checkpoint.durable.chunk_file import FOLDER, chunk_of, open_chunk
from windlass.checkpoint.durable.manifest import Manifest, step_folder
from windlass.checkpoint.durable.store import DurableStore, WrittenChunk
from windlass.checkpoint.image import Chunk, FragmentSpec, lay_out


def blocks(num_blocks: int = 10, num_bytes: int = 2 << 20) -> list[FragmentSpec]:
    """Each large enough for a chunk of its own, if it has more than half of a chunk's bytes."""
    return [FragmentSpec(f"w{number}", "uint8", (num_bytes,), (0,), (num_bytes,)) for number in range(num_blocks)]


def noise(key: str, num_bytes: int) -> bytes:
    pattern = hashlib.shake_256(key.encode()).digest(9973)
    return (pattern * (num_bytes // len(pattern) + 1))[:num_bytes]


def image_of(versions: Sequence[int], num_bytes: int = 3 << 20) -> Iterator[tuple[Chunk, memoryview]]:
    """Chunks of as many blocks as there are versions; the same version of a block is the same bytes."""
    for chunk in lay_out(blocks(len(versions), num_bytes)):
        names = [entry.spec.name for entry in chunk.entries]
        data = b"".join(noise(f"{name} {versions[int(name[1:])]}", num_bytes) for name in names)
        yield chunk, memoryview(data)


def put(store: DurableStore, versions: Sequence[int], num_bytes: int = 3 << 20) -> list[WrittenChunk]:
    return [store.put_chunk(chunk, data) for chunk, data in image_of(versions, num_bytes)]


def save(
    store: DurableStore, step: int, versions: Sequence[int], *, keep: int = 0, generation: int = 0, **more: Any
) -> list[WrittenChunk]:
    written = put(store, versions, **more)
    store.commit(step, generation, 1, {"versions": list(versions)}, written)
    store.retain(keep)
    return written


def content(store: DurableStore, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, its bytes checked."""
    manifest = Manifest.read(step_folder(store.location, step))
    found = {}
    for name, tensor in manifest.tensors.items():
        (part,) = tensor.fragments
        data = open_chunk(store.storage, part.chunk, manifest.chunks[part.chunk])
        found[name] = bytes(data[part.begin : part.end])
    return found


def expected(versions: Sequence[int], num_bytes: int = 3 << 20) -> dict[str, bytes]:
    return {f"w{number}": noise(f"w{number} {version}", num_bytes) for number, version in enumerate(versions)}


def num_chunks(store: DurableStore) -> int:
    return sum(chunk_of(name) is not None for name in store.storage.list(FOLDER))


def are_sound(directory: Path | str) -> bool:
    return all(result.is_sound for result in inspect.verify(directory))
