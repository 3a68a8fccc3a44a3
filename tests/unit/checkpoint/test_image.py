"""How blocks are laid out in an image, and what a region says of its image."""

from __future__ import annotations

import math
import random

import pytest
import torch

from windlass.checkpoint.image import (
    CHUNK_BYTES,
    DTYPE_BYTES,
    MAX_CHUNK_BYTES,
    PAGE_BYTES,
    Description,
    FragmentSpec,
    chunks_from_json,
    chunks_to_json,
    image_bytes,
    lay_out,
)


def block(name: str, *shape: int, dtype: str = "float32") -> FragmentSpec:
    return FragmentSpec(name, dtype, shape, (0,) * len(shape), shape)


def random_blocks(seed: int) -> list[FragmentSpec]:
    randomness = random.Random(seed)
    dtypes = list(DTYPE_BYTES)
    sizes = [0, 1, 3, 1000, CHUNK_BYTES // 8, 2 * CHUNK_BYTES, MAX_CHUNK_BYTES]
    return [
        block(f"w{i}", randomness.choice(sizes), randomness.choice([1, 2, 7]), dtype=randomness.choice(dtypes))
        for i in range(randomness.randrange(1, 30))
    ]


@pytest.mark.parametrize("seed", range(20))
def test_an_image_holds_every_element_once_and_in_order(seed: int) -> None:
    blocks = random_blocks(seed)
    chunks = lay_out(blocks)
    end = 0
    for chunk in chunks:
        assert chunk.begin % PAGE_BYTES == 0
        assert end <= chunk.begin < end + PAGE_BYTES
        for entry in chunk.entries:
            assert entry.begin == (chunk.begin if entry is chunk.entries[0] else end), "no gaps in a chunk"
            assert (entry.begin - chunk.begin) % DTYPE_BYTES[entry.spec.dtype] == 0
            end = entry.end
        assert len(chunk.entries) == 1 or chunk.end - chunk.begin <= CHUNK_BYTES
    parts = [entry.spec for chunk in chunks for entry in chunk.entries]
    for is_large in (True, False):
        names = [int(part.name[1:]) for part in parts if (part.nbytes >= CHUNK_BYTES) == is_large]
        assert names == sorted(names)
    for whole in blocks:
        rows = [part for part in parts if part.name == whole.name]
        assert sum(part.nbytes for part in rows) == whole.nbytes
        assert rows == sorted(rows, key=lambda part: part.offset), "the parts of a block in order are the block"
    assert image_bytes(chunks) % PAGE_BYTES == 0
    assert end <= image_bytes(chunks) < end + PAGE_BYTES


def test_an_image_of_nothing_is_empty() -> None:
    assert lay_out([]) == []
    assert image_bytes([]) == 0


def test_small_blocks_share_a_chunk_and_large_ones_do_not() -> None:
    small = CHUNK_BYTES // 16
    chunks = lay_out([block("a", small), block("b", small), block("c", CHUNK_BYTES), block("d", small)])
    assert [[entry.spec.name for entry in chunk.entries] for chunk in chunks] == [["c"], ["a", "b", "d"]]


def test_the_cut_is_of_names_and_shapes_alone() -> None:
    """Else a chunk that has not changed would not be found in the durable tier."""
    assert lay_out(random_blocks(5)) == lay_out(random_blocks(5))


@pytest.mark.parametrize("shape", [(40, 3), (1, 40, 3), (7,), (1, 1), (5, 1000)])
@pytest.mark.parametrize("max_bytes", [1, 24, 100, 10_000, 1 << 30])
def test_parts_are_the_block_along_its_first_dim(shape: tuple[int, ...], max_bytes: int) -> None:
    whole = FragmentSpec("w", "float32", tuple(10 * size for size in shape), tuple(size for size in shape), shape)
    parts = whole.parts(max_bytes)
    dim = next((i for i, size in enumerate(shape) if size > 1), 0)
    row_bytes = whole.nbytes // shape[dim]
    position = whole.offset[dim]
    for part in parts:
        assert part.offset[dim] == position
        assert part.offset[:dim] + part.offset[dim + 1 :] == whole.offset[:dim] + whole.offset[dim + 1 :]
        assert part.shape[:dim] + part.shape[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
        assert part.nbytes <= max(max_bytes, row_bytes)
        position += part.shape[dim]
    assert position == whole.offset[dim] + shape[dim]


def test_a_block_that_cannot_be_cut_stays_whole() -> None:
    scalar = FragmentSpec("w", "float64", (), (), ())
    assert scalar.parts(1) == [scalar]
    assert scalar.nbytes == 8


def test_chunks_come_back_from_json() -> None:
    chunks = lay_out(random_blocks(3))
    assert chunks_from_json(chunks_to_json(chunks)) == chunks


def region_of(description: Description, padding: int = 1000) -> memoryview:
    image = bytes(range(256)) * (image_bytes(description.chunks) // 256)
    return memoryview(description.to_bytes() + bytes(padding) + image)


def test_a_description_comes_back_and_says_where_the_image_is() -> None:
    description = Description(7, lay_out([block("a", 3000), block("b", 5, 5, dtype="int64")]), {"x": [1, None, "ü"]})
    region = region_of(description)
    found, begin = Description.from_region(region)
    assert found == description
    assert bytes(region[begin : begin + 256]) == bytes(range(256))
    assert Description.num_bytes(region) == len(description.to_bytes())


def test_memory_that_holds_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no image"):
        Description.from_region(memoryview(bytes(4096)))
    cut_off = memoryview(Description(0, [], {"key": "value"}).to_bytes())[:-3]
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        Description.from_region(cut_off)


def test_sizes_are_those_of_torch() -> None:

    for name, num_bytes in DTYPE_BYTES.items():
        assert torch.empty(0, dtype=getattr(torch, name)).element_size() == num_bytes
    assert block("w", 3, 4, dtype="bfloat16").nbytes == math.prod((3, 4)) * 2
