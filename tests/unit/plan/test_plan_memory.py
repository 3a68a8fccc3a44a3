"""The heap that is replayed follows the C library's rules."""

from __future__ import annotations

import random

import pytest

from windlass.plan.memory import PAGE_BYTES, Heap, live_peak, replay
from windlass.plan.recorder import MemoryEvent, MemoryKind

MIB = 1 << 20


@pytest.fixture
def heap() -> Heap:
    """Of a process that has given back 32 MiB, so that smaller pieces come from the heap."""
    heap = Heap(small_objects=0)
    heap.take(-1, 32 * MIB - 4096)
    heap.free(-1)
    return heap


def test_the_first_large_piece_is_mapped_and_leaves_nothing(heap: Heap) -> None:
    assert heap.held_bytes == 0
    assert 32 * MIB - 4096 <= heap.high_water_bytes <= 32 * MIB
    assert heap.mmap_threshold == heap.high_water_bytes, "pieces up to that size come from the heap from now on"


def test_pieces_above_the_limit_are_always_mapped(heap: Heap) -> None:
    for _ in range(2):
        heap.take(1, 40 * MIB)
        assert (heap.end, heap.mapped_bytes // MIB) == (0, 40)
        heap.free(1)
        assert heap.held_bytes == 0


def test_a_hole_is_used_again_by_what_fits_it_best(heap: Heap) -> None:
    for block, size in enumerate((4, 1, 2, 1)):
        heap.take(block, size * MIB)
    end = heap.end
    heap.free(0)
    heap.free(2)
    heap.take(4, 2 * MIB - 4096)
    heap.take(5, 4 * MIB - 4096)
    assert heap.end == end


def test_holes_beside_each_other_are_one(heap: Heap) -> None:
    for block in range(4):
        heap.take(block, 2 * MIB)
    end = heap.end
    heap.free(1)
    heap.free(0)
    heap.free(2)
    heap.take(4, 6 * MIB)
    assert heap.end == end


def test_the_end_is_given_back_when_it_is_long(heap: Heap) -> None:
    for block in range(5):
        heap.take(block, 20 * MIB)
    for block in (4, 3, 2):
        heap.free(block)
        assert heap.end >= 100 * MIB, "less than twice the threshold, 64 MiB, is free"
    heap.free(1)
    assert 20 * MIB <= heap.end < 21 * MIB
    assert heap.high_water_bytes >= 100 * MIB


@pytest.mark.parametrize("small_objects", [0.0, 2.0])
def test_small_objects_keep_holes_apart(small_objects: float) -> None:
    heap = Heap(small_objects)
    heap.take(-1, 32 * MIB - 4096)
    heap.free(-1)
    for block in range(11):
        heap.take(block, MIB)
    end = heap.end
    for block in range(10):
        heap.free(block)
    heap.take(99, 5 * MIB)
    assert (heap.end == end) == (small_objects == 0.0)


def test_peaks_of_a_replay() -> None:
    events = [
        MemoryEvent(MemoryKind.take, 0, MIB),
        MemoryEvent(MemoryKind.take, 1, 3 * MIB),
        MemoryEvent(MemoryKind.free, 1, 3 * MIB),
        MemoryEvent(MemoryKind.take, 2, 2 * MIB),
    ]
    assert live_peak(events) == 4 * MIB
    heap = replay(events)
    assert 4 * MIB <= heap.high_water_bytes < 4.2 * MIB
    assert 3 * MIB <= heap.held_bytes < 4.2 * MIB


def test_a_threshold_that_was_set_stays() -> None:
    heap = Heap(small_objects=0, mmap_threshold=8 * MIB)
    for _ in range(2):
        heap.take(1, 20 * MIB)
        assert (heap.end, heap.mapped_bytes // MIB) == (0, 20)
        heap.free(1)
        assert heap.held_bytes == 0
    heap.take(2, 4 * MIB)
    assert heap.end > 4 * MIB and heap.mapped_bytes == 0


def test_pages_of_a_mapping_take_no_part_in_the_heap() -> None:
    heap = replay([MemoryEvent(MemoryKind.map, 0, 3 * MIB)])
    assert (heap.end, heap.mapped_bytes, heap.high_water_bytes) == (0, 3 * MIB, 3 * MIB)


def test_what_is_trimmed_is_held_again_when_it_is_used(heap: Heap) -> None:
    for block in range(4):
        heap.take(block, 2 * MIB)
    full = heap.held_bytes
    heap.free(0)
    heap.free(2)
    assert heap.held_bytes == full
    heap.trim()
    trimmed = heap.held_bytes
    assert full - 4.2 * MIB < trimmed < full - 3.9 * MIB
    heap.take(4, MIB)
    assert heap.held_bytes == pytest.approx(trimmed + MIB, abs=PAGE_BYTES)
    heap.free(4)
    assert heap.held_bytes == pytest.approx(trimmed + MIB, abs=PAGE_BYTES), "only a trim gives it back"
    heap.take(5, 2 * MIB - PAGE_BYTES)
    heap.take(6, 2 * MIB - PAGE_BYTES)
    assert heap.held_bytes == pytest.approx(full, abs=0.2 * MIB)


def test_no_byte_is_counted_twice_however_the_heap_is_used(heap: Heap) -> None:
    randomness = random.Random(0)
    block, living = 0, list[int]()
    for _ in range(2000):
        if randomness.random() < 0.02:
            heap.trim()
        elif living and randomness.random() < 0.48:
            heap.free(living.pop(randomness.randrange(len(living))))
        else:
            heap.take(block, randomness.randrange(1, 64) * PAGE_BYTES)
            living.append(block)
            block += 1
        assert heap.held_bytes >= sum(heap._placed[number][1] for number in living)
    heap.trim()
    used = {page for number in living for page in pages_of(heap, number)}
    assert heap.held_bytes == pytest.approx(len(used) * PAGE_BYTES, abs=PAGE_BYTES)
    for number in living:
        heap.free(number)
    heap.trim()
    assert heap.held_bytes == 0


def pages_of(heap: Heap, block: int) -> set[int]:
    address, size = heap._placed[block]
    return set(range(address // PAGE_BYTES, -(-(address + size) // PAGE_BYTES)))
