"""What is brought, changed, taken back and let go, in an arena with room for a few."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.files import disk_full_after
from torch import Tensor

from windlass.errors import OffloadError
from windlass.offload.arena import Arena
from windlass.offload.conveyor import Conveyor, Load
from windlass.offload.direct_io import PAGE_BYTES, Engine
from windlass.offload.staging import Staging
from windlass.offload.tier_file import TierFolder

SIZE = 3 * PAGE_BYTES
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TierFolder]:
    engine = Engine(num_threads=2)
    folder = TierFolder(tmp_path / "tier", engine, "rank0")
    yield folder
    folder.close()
    engine.close()


def conveyor_of(num_loads: int) -> tuple[Conveyor, Arena]:
    arena = Arena(num_loads * SIZE)
    return Conveyor(arena, Staging(CPU)), arena


def written(folder: TierFolder, count: int) -> list[Load]:
    """Loads full of 1, 2, ..."""
    loads = [Load(folder.create(SIZE)) for _ in range(count)]
    conveyor, _ = conveyor_of(count)
    for number, load in enumerate(loads, start=1):
        conveyor.blank([load])[0].fill_(number)
        conveyor.take_back(load)
    conveyor.drain()
    return loads


def reads(folder: TierFolder) -> float:
    """How many loads were read so far."""
    return folder.engine.figures.read_bytes / SIZE


def settle(folder: TierFolder) -> None:
    """Returns when the engine has nothing to do any more."""
    for file in folder._files:
        for transfer in (file._write, *file._reads):
            transfer.settle()


def holds(data: Tensor, value: int) -> bool:
    return bool((data == value).all())


def test_what_is_taken_back_is_brought_again(folder: TierFolder) -> None:
    conveyor, arena = conveyor_of(2)
    load = Load(folder.create(SIZE))
    assert load.num_bytes == SIZE
    data = conveyor.bring(load)
    assert data.shape == (SIZE,) and data.dtype == torch.uint8 and reads(folder) == 0, "there is nothing to read yet"
    data.fill_(5)
    conveyor.take_back(load)
    for value in (5, 6):
        data = conveyor.bring(load)
        assert holds(data, value)
        data.add_(1)
        conveyor.take_back(load)
    conveyor.drain()
    assert arena.free_bytes == arena.num_bytes and reads(folder) == 2


def test_what_is_dropped_has_not_been_changed(folder: TierFolder) -> None:
    (load,) = written(folder, 1)
    conveyor, arena = conveyor_of(1)
    conveyor.bring(load).fill_(9)
    conveyor.drop(load)
    assert arena.free_bytes == SIZE and holds(conveyor.bring(load), 1)


def test_what_is_brought_twice_is_read_once(folder: TierFolder) -> None:
    (load,) = written(folder, 1)
    conveyor, _ = conveyor_of(1)
    conveyor.look_ahead([load])
    first = conveyor.bring(load)
    assert conveyor.bring(load).data_ptr() == first.data_ptr() and reads(folder) == 1


def test_looking_ahead_fills_the_room_in_order(folder: TierFolder) -> None:
    loads = written(folder, 4)
    conveyor, arena = conveyor_of(3)
    conveyor.bring(loads[0])
    conveyor.look_ahead(loads[1:])
    settle(folder)
    assert reads(folder) == 3 and arena.free_bytes == 0
    assert holds(conveyor.bring(loads[1]), 2) and holds(conveyor.bring(loads[2]), 3)
    assert reads(folder) == 3, "they were there"
    conveyor.drop(loads[0])
    conveyor.look_ahead(loads[1:])
    assert holds(conveyor.bring(loads[3]), 4) and reads(folder) == 4


def test_looking_ahead_passes_over_what_has_no_bytes_yet(folder: TierFolder) -> None:
    blank, full = Load(folder.create(SIZE)), *written(folder, 1)
    conveyor, _ = conveyor_of(1)
    conveyor.look_ahead([blank, full])
    settle(folder)
    assert reads(folder) == 1


def test_what_was_brought_too_early_makes_room_the_last_first(folder: TierFolder) -> None:
    loads = written(folder, 4)
    conveyor, _ = conveyor_of(3)
    conveyor.look_ahead(loads[:3])
    assert holds(conveyor.bring(loads[3]), 4)
    assert holds(conveyor.bring(loads[0]), 1) and holds(conveyor.bring(loads[1]), 2)
    settle(folder)
    assert reads(folder) == 4, "of the three, only the last was let go"


def test_what_is_in_use_is_never_let_go(folder: TierFolder) -> None:
    loads = written(folder, 3)
    conveyor, _ = conveyor_of(2)
    used = [conveyor.bring(load) for load in loads[:2]]
    with pytest.raises(AssertionError, match="no room for 12288 bytes beside what is in use"):
        conveyor.bring(loads[2])
    assert holds(used[0], 1) and holds(used[1], 2)
    conveyor.look_ahead(loads)
    conveyor.take_back(loads[0])
    assert holds(conveyor.bring(loads[2]), 3), "it waits for what leaves"


def test_a_blank_is_not_read(folder: TierFolder) -> None:
    (load,) = written(folder, 1)
    conveyor, _ = conveyor_of(1)
    for value in (7, 8):
        conveyor.blank([load])[0].fill_(value)  # the second waits until the first is home
        conveyor.take_back(load)
    assert reads(folder) == 0
    assert holds(conveyor.bring(load), 8)
    with pytest.raises(AssertionError, match="what is brought is changed where it is"):
        conveyor.blank([load])


def test_blanks_that_are_asked_for_together_find_room_together(folder: TierFolder) -> None:
    """What was brought ahead leaves a gap for the first, which would cut the room for the second in two."""
    early, gap, late = (Load(folder.create(size * PAGE_BYTES)) for size in (1, 3, 2))
    conveyor = Conveyor(Arena(6 * PAGE_BYTES), Staging(CPU))
    for load in (early, gap, late):
        conveyor.blank([load])
        conveyor.take_back(load)
    conveyor.drain()
    conveyor.look_ahead([early, gap, late])
    conveyor.bring(gap)
    conveyor.drop(gap)
    halves = [Load(folder.create(SIZE)) for _ in range(2)]
    for number, data in enumerate(conveyor.blank(halves)):
        data.fill_(number)
    for load in halves:
        conveyor.take_back(load)
    assert [holds(conveyor.bring(load), number) for number, load in enumerate(halves)] == [True, True]


def test_memory_of_the_host_is_used_where_it_is() -> None:
    conveyor, arena = conveyor_of(1)
    homes = [torch.full((SIZE,), number, dtype=torch.uint8) for number in range(3)]
    loads = [Load(home) for home in homes]
    conveyor.look_ahead(loads)
    for home, load in zip(homes, loads, strict=True):
        assert load.num_bytes == SIZE
        data = conveyor.bring(load)
        assert data.data_ptr() == home.data_ptr()
        data.add_(1)
        conveyor.take_back(load)
        conveyor.blank([load])[0].add_(1)
        conveyor.take_back(load)
    assert arena.free_bytes == SIZE and [int(home[-1]) for home in homes] == [2, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_any_use_gives_the_bytes_that_were_taken_back_last(seed: int, folder: TierFolder) -> None:
    """300 random calls on 6 loads of several sizes, in an arena with room for 3 of the largest."""
    draw = random.Random(seed)
    in_memory = torch.zeros(SIZE, dtype=torch.uint8)
    loads = [Load(in_memory), *(Load(folder.create(SIZE - 1000 * number)) for number in range(5))]
    arena = Arena(3 * SIZE)
    conveyor = Conveyor(arena, Staging(CPU))
    expected: dict[Load, int] = dict.fromkeys(loads, 0)
    used: dict[Load, Tensor] = {}

    def begin(load: Load) -> None:
        if draw.random() < 0.3 or (load.home is not in_memory and not load.home.has_data):  # type: ignore[union-attr]
            used[load] = conveyor.blank([load])[0] if load not in conveyor._held else conveyor.bring(load)
            expected[load] = draw.randrange(256)
            used[load].fill_(expected[load])
        else:
            used[load] = conveyor.bring(load)
            assert holds(used[load], expected[load])

    def end(load: Load) -> None:
        data = used.pop(load)
        assert holds(data, expected[load]), "nobody else has written there"
        expected[load] = (expected[load] + 1) % 256
        data.add_(1)
        conveyor.take_back(load)

    for _ in range(300):
        if draw.random() < 0.3:
            conveyor.look_ahead(draw.sample(loads, 4))
        elif used and (len(used) == 3 or draw.random() < 0.5):
            end(draw.choice(list(used)))
        else:
            begin(draw.choice([load for load in loads if load not in used]))
    for load in list(used):
        end(load)
    conveyor.drain()
    for load in loads:
        assert holds(conveyor.bring(load), expected[load])
        conveyor.drop(load)
    conveyor.abandon()
    assert arena.free_bytes == arena.num_bytes


@pytest.mark.parametrize("meets_it", ["drain", "bring", "blank", "look_ahead"])
def test_a_write_that_fails_is_told_to_whoever_comes_next(meets_it: str, folder: TierFolder) -> None:
    loads = written(folder, 2)
    conveyor, arena = conveyor_of(1)
    conveyor.bring(loads[0])
    with disk_full_after(PAGE_BYTES):
        conveyor.take_back(loads[0])
        settle(folder)
    actions = {
        "drain": conveyor.drain,
        "bring": lambda: conveyor.bring(loads[1]),  # it needs the room
        "blank": lambda: conveyor.blank(loads[:1]),
        "look_ahead": lambda: conveyor.look_ahead([]),
    }
    with pytest.raises(OffloadError, match="cannot write 12288 bytes at 65536: File too large"):
        actions[meets_it]()
    assert arena.free_bytes == arena.num_bytes
    assert holds(conveyor.bring(loads[1]), 2), "other files are as they were"


def test_a_read_that_fails_is_told_to_whoever_asked(folder: TierFolder) -> None:
    loads = written(folder, 2)
    conveyor, arena = conveyor_of(2)
    path = min(folder.path.glob("*.tier"))
    with path.open("r+b") as file:
        file.truncate(PAGE_BYTES)
    conveyor.look_ahead(loads[1:])
    conveyor.look_ahead(loads)
    with pytest.raises(OffloadError, match="something has cut it"):
        conveyor.bring(loads[0])
    conveyor.abandon()
    assert arena.free_bytes == arena.num_bytes


def test_abandoning_lets_go_of_everything_and_raises_nothing(folder: TierFolder) -> None:
    loads = written(folder, 4)
    conveyor, arena = conveyor_of(4)
    conveyor.bring(loads[0])
    conveyor.bring(loads[1])
    conveyor.look_ahead(loads[2:])
    with disk_full_after(PAGE_BYTES):
        conveyor.take_back(loads[0])
        conveyor.abandon()
    assert arena.free_bytes == arena.num_bytes
    conveyor.drain()
    assert holds(conveyor.bring(loads[1]), 2)


def test_writes_begin_at_once_where_no_device_is_to_be_waited_for(folder: TierFolder) -> None:
    (load,) = written(folder, 1)
    conveyor, _ = conveyor_of(1)
    before = folder.engine.figures.write_bytes
    conveyor.bring(load).fill_(3)
    conveyor.take_back(load)
    settle(folder)
    assert folder.engine.figures.write_bytes == before + SIZE
    conveyor.begin_writes()
    pin = load.home.pin()  # type: ignore[union-attr]
    assert b"".join(bytes(part) for part in pin.read()) == bytes([3]) * SIZE
    pin.release()
