"""Files of chunks are safetensors files, and tensors become chunks without a copy of the whole state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import bits_of

from windlass.checkpoint import image
from windlass.checkpoint.durable.chunk_file import (
    DTYPE_CODES,
    FILLER,
    chunk_name,
    chunk_of,
    chunks_named_in,
    open_chunk,
    preamble,
    preamble_of_length,
)
from windlass.checkpoint.durable.stage import spec_of, stage_chunks
from windlass.checkpoint.durable.store import DurableStore, WrittenChunk
from windlass.checkpoint.image import DTYPE_BYTES, PAGE_BYTES, Chunk, Entry, FragmentSpec, lay_out
from windlass.parallel.fragment import Fragment, fragment_of

SHAPES = [(), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4)]


def example(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def every_dtype_and_shape() -> dict[str, torch.Tensor]:
    return {f"{name}{list(shape)}": example(getattr(torch, name), shape) for name in DTYPE_CODES for shape in SHAPES}


def put(store: DurableStore, tensors: dict[str, torch.Tensor]) -> list[WrittenChunk]:
    fragments = [(fragment_of(name, tensor), tensor) for name, tensor in tensors.items()]
    return [store.put_chunk(chunk, data) for chunk, data in stage_chunks(fragments)]


def test_the_safetensors_library_reads_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = every_dtype_and_shape()
    assert DTYPE_CODES.keys() == DTYPE_BYTES.keys()
    written = put(DurableStore(tmp_path), tensors)
    loaded = {}
    for chunk in written:
        loaded |= load_file(tmp_path / chunk_name(chunk.sha256))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert bits_of(loaded[name]) == bits_of(tensor), name


def test_a_header_of_a_given_length_makes_a_file_of_data_a_chunk(tmp_path: Path) -> None:
    """With bytes between and after the tensors that mean nothing."""
    tensors = {"one": torch.arange(5, dtype=torch.int64), "two": torch.rand(3, 7), "three": torch.rand(2).half()}
    places, data = [], bytearray(b"\xee" * 4096)
    for (name, tensor), begin in zip(tensors.items(), (0, 40, 200), strict=True):
        entry = Entry(spec_of(fragment_of(name, tensor)), begin)
        data[entry.begin : entry.end] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        places.append(entry)
    head = preamble_of_length(places, len(data), 8192)
    assert head is not None and len(head) == 8192
    (tmp_path / "file").write_bytes(head + data)
    loaded = load_file(tmp_path / "file")
    fillers = {name: value for name, value in loaded.items() if name.startswith(FILLER)}
    assert [value.numel() for value in fillers.values()] == [200 - 40 - 84, 4096 - 204]
    assert {name: bits_of(value) for name, value in loaded.items() if name not in fillers} == {
        name: bits_of(value) for name, value in tensors.items()
    }
    assert preamble_of_length(places, len(data), 256) is None


def test_entries_say_where_the_bytes_are_in_the_file(tmp_path: Path) -> None:
    tensors = every_dtype_and_shape()
    store = DurableStore(tmp_path)
    for chunk in put(store, tensors):
        data = open_chunk(store.storage, chunk.sha256, chunk.size)
        assert chunk.entries[0].begin % PAGE_BYTES == 0
        for entry in chunk.entries:
            tensor = tensors[entry.spec.name]
            assert bytes(data[entry.begin : entry.end]) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_not_a_number_keeps_its_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -0x7FFFFF, -(1 << 31), 0x7F800000], dtype=torch.int32)  # NaNs, -0, infinity
    (chunk,) = put(DurableStore(tmp_path), {"odd": bits.view(torch.float32)})
    assert torch.equal(load_file(tmp_path / chunk_name(chunk.sha256))["odd"].view(torch.int32), bits)


def test_a_transposed_tensor_is_written_in_row_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    (chunk,) = put(DurableStore(tmp_path), {"transposed": tensor})
    assert torch.equal(load_file(tmp_path / chunk_name(chunk.sha256))["transposed"], tensor)


def test_large_blocks_are_staged_in_parts_of_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MAX_CHUNK_BYTES", 4096)
    monkeypatch.setattr(image, "CHUNK_BYTES", 1024)
    whole = torch.randn(10, 7, 100)
    fragment = Fragment("w", (20, 9, 100), (5, 1, 0), (10, 7, 100), torch.float32)
    found = torch.zeros(20, 9, 100)
    sizes = []
    for chunk, data in stage_chunks([(fragment, whole)]):
        sizes.append(len(data))
        (entry,) = chunk.entries
        block = entry.spec
        index = tuple(slice(start, start + size) for start, size in zip(block.offset, block.shape, strict=True))
        found[index] = torch.frombuffer(bytearray(data), dtype=torch.float32).view(block.shape)
    assert sizes == [2800] * 10
    assert torch.equal(found[fragment.slices], whole)
    assert found.count_nonzero() == whole.count_nonzero()


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("row_bytes", [1 << 20, 5 << 20, 40 << 20, 70 << 20])
def test_no_chunk_has_two_parts_of_one_tensor(rows: int, row_bytes: int) -> None:
    """So the tensor's name will do for a key."""
    blocks = [FragmentSpec(name, "uint8", (rows, row_bytes), (0, 0), (rows, row_bytes)) for name in ("a", "b")]
    for chunk in lay_out(blocks):
        names = [entry.spec.name for entry in chunk.entries]
        assert len(set(names)) == len(names)


def test_two_parts_of_one_tensor_in_a_chunk_are_refused() -> None:
    entries = [Entry(FragmentSpec("w", "float32", (4,), (start,), (2,)), 4 * start) for start in (0, 2)]
    with pytest.raises(ValueError, match="two parts"):
        preamble(entries)


def test_the_same_bytes_of_another_name_are_another_chunk(tmp_path: Path) -> None:
    store = DurableStore(tmp_path)
    chunks = [put(store, {name: torch.zeros(3)})[0] for name in ("a", "b", "a")]
    assert [chunk.written for chunk in chunks] == [True, True, False]
    assert len({chunk.sha256 for chunk in chunks}) == 2


def test_written_chunks_travel_as_json(tmp_path: Path) -> None:
    for chunk in put(DurableStore(tmp_path), every_dtype_and_shape()):
        assert WrittenChunk.from_json(json.loads(json.dumps(chunk.to_json()))) == chunk


def test_names_of_chunks_and_of_nothing_else() -> None:
    sha256 = "0123456789abcdef" * 4
    assert chunk_of(chunk_name(sha256)) == sha256
    for name in (f"chunks/{sha256}.safetensors.damaged", f"chunks/{sha256[1:]}.safetensors", f"chunks/{sha256}"):
        assert chunk_of(name) is None
    assert chunks_named_in(f'"{sha256}": 3, "a{sha256}"\x00'.encode()) == {sha256}


def test_a_chunk_is_a_run_of_its_image() -> None:
    """The bytes come from anywhere in an image; what is written knows only the file."""
    block = FragmentSpec("w", "int32", (2,), (0,), (2,))
    assert preamble([Entry(block, 0)]) == preamble([Entry(block, 8192)])
    assert Chunk((Entry(block, 8192),)).begin == 8192
