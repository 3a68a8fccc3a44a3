"""Files that are written here and files that the safetensors library writes are the same format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from windlass.checkpoint import safetensors_file
from windlass.checkpoint.safetensors_file import DTYPE_CODES, SafetensorsReader, Stored

SHAPES = [(), (1,), (0,), (3, 0, 2), (5, 7), (2, 3, 4)]


def example(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


def every_dtype_and_shape() -> dict[str, torch.Tensor]:
    return {f"{dtype}{list(shape)}": example(dtype, shape) for dtype in DTYPE_CODES for shape in SHAPES}


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = every_dtype_and_shape()
    safetensors_file.write(tmp_path / "file", tensors.items())
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor), name


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    tensors = every_dtype_and_shape()
    stored, _ = safetensors_file.write(tmp_path / "file", tensors.items())
    reader = SafetensorsReader(tmp_path / "file")
    for entry in stored:
        tensor = tensors[entry.key]
        assert torch.equal(reader.read(entry, tensor.dtype, tuple(tensor.shape)), tensor)
    reader.close()


def test_not_a_number_keeps_its_bits(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, -0x7FFFFF, -(1 << 31), 0x7F800000], dtype=torch.int32)  # NaNs, -0, infinity
    (entry,), _ = safetensors_file.write(tmp_path / "file", [("odd", bits.view(torch.float32))])
    reader = SafetensorsReader(tmp_path / "file")
    assert torch.equal(reader.read(entry, torch.float32, (4,)).view(torch.int32), bits)


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    tensor = example(torch.bfloat16, (5, 7))
    save_file({"weight": tensor}, tmp_path / "file")
    reader = SafetensorsReader(tmp_path / "file")
    own = safetensors_file.write(tmp_path / "own", [("weight", tensor)])[0][0]
    entry = Stored("weight", reader.data_begin, reader.data_begin + tensor.nbytes, own.sha256)
    assert torch.equal(reader.read(entry, torch.bfloat16, (5, 7)), tensor)


def test_a_transposed_tensor_is_written_in_row_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    safetensors_file.write(tmp_path / "file", [("transposed", tensor)])
    assert torch.equal(load_file(tmp_path / "file")["transposed"], tensor)


def test_data_begins_aligned(tmp_path: Path) -> None:
    for name in ("a", "ab", "a longer name"):
        stored, _ = safetensors_file.write(tmp_path / name, [(name, torch.zeros(3))])
        assert stored[0].begin % safetensors_file.ALIGNMENT == 0


def test_a_large_tensor_is_written_in_parts_with_one_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(1000)
    whole, _ = safetensors_file.write(tmp_path / "whole", [("x", tensor)])
    monkeypatch.setattr(safetensors_file, "WRITE_BYTES", 13)
    parts, _ = safetensors_file.write(tmp_path / "parts", [("x", tensor)])
    assert parts == whole
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        safetensors_file.write(tmp_path / "file", [("x", torch.zeros(1))])
    assert (tmp_path / "file").read_text() == "mine"


def test_reading_checks_the_bytes(tmp_path: Path) -> None:
    (entry,), _ = safetensors_file.write(tmp_path / "file", [("weight", torch.zeros(4))])
    data = bytearray((tmp_path / "file").read_bytes())
    data[entry.begin + 5] ^= 4
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match="the bytes of weight have changed"):
        SafetensorsReader(tmp_path / "file").read(entry, torch.float32, (4,))


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file"):
        SafetensorsReader(tmp_path / "file")
