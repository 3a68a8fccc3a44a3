"""Buffers of exact size from one piece of memory."""

from __future__ import annotations

import mmap
import random
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from windlass.errors import DoesNotFit
from windlass.offload.arena import Arena, Buffer
from windlass.offload.direct_io import round_to_pages

PAGE = mmap.PAGESIZE


def test_buffers_are_exact_and_aligned() -> None:
    arena = Arena(10 * PAGE)
    for num_bytes in (1, PAGE, PAGE + 1):
        buffer = arena.allocate(num_bytes)
        assert (buffer.data.dtype, buffer.data.shape) == (torch.uint8, (num_bytes,))
        assert buffer.data.data_ptr() % PAGE == 0
    assert arena.free_bytes == 6 * PAGE, "whole pages, and no power of two"
    assert arena.num_bytes == 10 * PAGE


def test_the_whole_arena_can_be_one_buffer_again_and_again() -> None:
    arena = Arena(5 * PAGE - 7)
    places = set()
    for _ in range(3):
        buffer = arena.allocate(5 * PAGE - 7)
        assert arena.free_bytes == 0
        assert arena.try_allocate(1) is None
        places.add(buffer.data.data_ptr())
        buffer.release()
    assert len(places) == 1
    assert arena.free_bytes == 5 * PAGE


def test_buffers_of_nothing_take_nothing() -> None:
    arena = Arena(PAGE)
    buffer = arena.allocate(0)
    assert (buffer.data.nbytes, arena.free_bytes) == (0, PAGE)
    buffer.release()
    assert arena.free_bytes == PAGE


@pytest.mark.parametrize("seed", range(5))
def test_buffers_never_overlap_and_holes_are_closed(seed: int) -> None:
    randomness = random.Random(seed)
    arena = Arena(64 * PAGE)
    held: list[tuple[Buffer, int]] = []
    for number in range(1000):
        buffer = arena.try_allocate(randomness.randint(1, 20 * PAGE)) if randomness.random() < 0.6 else None
        if buffer is not None:
            buffer.data.fill_(number % 251)
            held.append((buffer, number % 251))
        elif held:
            other, mark = held.pop(randomness.randrange(len(held)))
            assert bool((other.data == mark).all())
            other.release()
        assert arena.free_bytes == 64 * PAGE - sum(round_to_pages(other.data.nbytes) for other, _ in held)
    for buffer, _ in held:
        buffer.release()
    whole = arena.try_allocate(64 * PAGE)
    assert whole is not None


def test_a_buffer_is_waited_for() -> None:
    arena = Arena(4 * PAGE)
    first, second = arena.allocate(2 * PAGE), arena.allocate(2 * PAGE)
    got: list[Buffer] = []
    thread = threading.Thread(target=lambda: got.append(arena.allocate(3 * PAGE)))
    thread.start()
    first.release()
    thread.join(0.2)
    assert thread.is_alive(), "two pages are free, and three were asked for"
    second.release()
    thread.join(60)
    assert got[0].data.nbytes == 3 * PAGE


def test_a_buffer_that_leaves_no_room_beside_it_is_not_given() -> None:
    arena = Arena(8 * PAGE)
    assert arena.try_allocate(3 * PAGE, spare_bytes=5 * PAGE + 1) is None
    low = arena.try_allocate(3 * PAGE, spare_bytes=5 * PAGE)
    high = arena.try_allocate(3 * PAGE)
    assert low is not None and high is not None
    low.release()
    assert arena.free_bytes == 5 * PAGE
    assert arena.try_allocate(PAGE, spare_bytes=4 * PAGE) is None, "five pages are free, but not in one piece"
    high.release()
    assert arena.free_bytes == 8 * PAGE, "what was tried and not given is free"


def test_a_buffer_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{PAGE + 1} bytes does not fit"):
        Arena(PAGE).allocate(PAGE + 1)
    assert Arena(PAGE).try_allocate(PAGE + 1) is None
    with pytest.raises(ValueError, match="not 0"):
        Arena(0)


def test_a_buffer_is_released_once() -> None:
    buffer = Arena(PAGE).allocate(1)
    buffer.release()
    with pytest.raises(AssertionError):
        buffer.release()


def test_closing_wakes_who_waits_and_leaves_tensors_alone() -> None:
    arena = Arena(PAGE)
    buffer = arena.allocate(PAGE)
    buffer.data.fill_(7)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            arena.allocate(1)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    arena.close()
    arena.close()
    thread.join(60)
    assert "closed" in str(errors[0])
    with pytest.raises(RuntimeError, match="closed"):
        arena.try_allocate(1)
    assert bool((buffer.data == 7).all())
    buffer.release()


def test_more_than_the_machine_has_is_the_users_mistake() -> None:
    with pytest.raises(DoesNotFit, match=r"offload\.max_host_bytes=.*Fix: lower it"):
        Arena(1 << 60)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_forked_processes_do_not_get_the_memory() -> None:
    """Else each page would be copied at its next write, as long as a data loader lives."""
    data = Arena(64 * PAGE).allocate(1).data
    text = Path("/proc/self/smaps").read_text()
    flags = next(
        match[3].split()
        for match in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)*?VmFlags: (.*)$", text, re.MULTILINE)
        if int(match[1], 16) <= data.data_ptr() < int(match[2], 16)
    )
    assert "dc" in flags


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_memory_is_pinned_for_a_device_only() -> None:
    with pytest.raises(ValueError, match="CUDA"):
        Arena(PAGE, pin=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_buffers_are_copied_behind_the_program() -> None:
    arena = Arena(64 * PAGE, pin=True)
    data = arena.allocate(3 * PAGE + 1).data
    assert data.is_pinned()
    data.random_(0, 256)
    copy = data.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(copy.cpu(), data)
    arena.close()
    assert not data.is_pinned()
