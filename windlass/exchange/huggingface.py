"""Writes folders of weights as Hugging Face keeps them: sharded safetensors, an index, config.json.

Which weights a model has and what its config.json says is the business of who knows the model; here is the format.
Shards are written a tensor at a time, so that a model larger than memory is exported from a small machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from windlass.exchange.folder import Report
from windlass.models.hf_changes import to_json
from windlass.models.huggingface_folder import DTYPE_CODES, INDEX

ALIGNMENT = 64


@dataclass(frozen=True)
class Weight:
    """A tensor to export: `read` returns it, whole and on the CPU, in any dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """In the export."""
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cut_into_shards(weights: Iterable[Weight], max_shard_bytes: int) -> list[list[Weight]]:
    """The weights in their order, in shards of at most `max_shard_bytes` of tensors; a larger one has its own."""
    shards: list[list[Weight]] = []
    num_bytes = 0
    for weight in weights:
        if not shards or num_bytes + weight.nbytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(weight)
        num_bytes += weight.nbytes
    return shards


def write_weights(
    folder: Path, weights: Sequence[Weight], files: Mapping[str, bytes], max_shard_bytes: int, report: Report
) -> list[Path]:
    """Writes and syncs the shards, the index and `files`, by name, into the empty `folder`; memory is one tensor.

    Returns:
        The shards.

    Raises:
        OSError: the disk is full or refuses.
    """
    shards = cut_into_shards(weights, max_shard_bytes)
    paths, weight_map, num_done = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        num_done = _write_shard(path, shard, num_done, report)
        weight_map |= {weight.name: path.name for weight in shard}
        paths.append(path)
    index = {"metadata": {"total_size": num_done}, "weight_map": weight_map}
    for name, content in {INDEX: to_json(index), **files}.items():
        _write_file(folder / name, content)
    return paths


def _write_shard(path: Path, weights: Sequence[Weight], num_done: int, report: Report) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
    offset = 0
    for weight in weights:
        header[weight.name] = {
            "dtype": DTYPE_CODES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [offset, offset + weight.nbytes],
        }
        offset += weight.nbytes
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-(8 + len(data)) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for weight in weights:
            tensor = weight.read().to(weight.dtype).contiguous()
            assert tuple(tensor.shape) == weight.shape, f"{weight.name}: {tensor.shape} is not {weight.shape}"
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            del tensor  # gone before the next one is read
            num_done += weight.nbytes
            report(num_done)
        file.flush()
        os.fsync(file.fileno())
    return num_done


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
