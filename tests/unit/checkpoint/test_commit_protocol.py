"""The commit protocol keeps its promises in whatever order things happen, and breaking it anywhere is seen."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, deque
from collections.abc import Iterable
from typing import Self

import pytest
from protocol_model import Event, World
from protocol_node import Job, Violation, clone_core

from windlass.checkpoint.agent.core import AgentCore
from windlass.checkpoint.agent.effects import Effect, Group, SaveAborted, SaveGeneration, SealSlot, SendReport
from windlass.checkpoint.agent.ledger import Ledger, Phase, Report, Slot, SnapshotId
from windlass.checkpoint.agent.progress import Progress

SMALL = [
    Job(2, 1, 2, max_snapshots=1, max_kills=0, max_crashes=1, max_pins=0),
    Job(2, 1, 2, max_snapshots=2, max_kills=1, max_crashes=0, max_pins=0),
    Job(2, 0, 1, max_snapshots=1, max_kills=1, max_crashes=0, max_pins=0),
    Job(3, 1, 2, max_snapshots=1, max_kills=0, max_crashes=0, max_pins=0),
]
"""Jobs all of whose states are looked at."""
LARGER = [
    Job(2, 1, 2, max_snapshots=1, max_kills=1, max_crashes=1, max_pins=0),
    Job(2, 0, 2, max_snapshots=1, max_kills=1, max_crashes=1, max_pins=0),
    Job(2, 1, 2, max_snapshots=2, max_kills=1, max_crashes=0, max_pins=1),
    Job(2, 0, 1, max_snapshots=1, max_kills=0, max_crashes=1, max_pins=1),
    Job(3, 1, 2, max_snapshots=1, max_kills=1, max_crashes=0, max_pins=0),
]
SHAPES = [(n, m, s) for n in (2, 3, 4) for m in range(n) for s in (2, 3)] + [(n, 0, 1) for n in (2, 3, 4)]
"""Nodes, parity shards and slots of the jobs that are walked through. A single slot promises less: `World._begin`."""
LONG = Job(3, 1, 2, max_snapshots=8, max_kills=4, max_crashes=3, max_pins=3)
WEIGHTS = {"crash": 0.6, "abort": 0.3, "kill": 0.3, "killed": 0.3, "lose": 0.3, "pin": 0.3}
"""Weights of kinds of events in a walk, 15 for the others: something is to be committed before something breaks."""
KINDS = {"agree", "begin", "local", "prepare", "hear", "fence", "rebuild", "unpin", *WEIGHTS}
Trace = tuple[()] | tuple["Trace", Event]
"""The events so far, the last one outermost: traces share what they have in common."""


class Explorer:
    """Runs events and checks the state after each. `seen` are the interleavings: the sequences that were run."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.seen: set[int] = set()
        self.kinds: Counter[str] = Counter()
        self.num_states = 0

    def search(self, max_steps: int, look_every: int = 8) -> bool:
        """Takes all states breadth first, each once; False if there were more than `max_steps` steps."""
        start = World.begin(self.job)
        known, num_steps = {start.key()}, 0
        queue: deque[tuple[World, Trace, int]] = deque([(start, (), hash(self.job))])
        while queue:
            world, trace, code = queue.popleft()
            for event in world.events():
                if num_steps == max_steps:
                    return False
                num_steps += 1
                after, path = self._step(world, event, trace), hash((code, event))
                self.seen.add(path)
                key = after.key()
                if key not in known:
                    known.add(key)
                    if len(known) % look_every == 0:
                        self._look(after, (trace, event))
                    queue.append((after, (trace, event), path))
            self.num_states += 1
        return True

    def walk(self, seed: int, num_steps: int = 100, look_every: int = 16) -> None:
        """Takes steps at random, by kinds: there are far more reports than anything else."""
        choose = random.Random(seed)
        world, trace, code = World.begin(self.job), (), hash(self.job)
        for number in range(1, num_steps + 1):
            by_kind: dict[str, list[Event]] = {}
            for event in world.events():
                by_kind.setdefault(event[0], []).append(event)
            if not by_kind:
                break
            kind = choose.choices(list(by_kind), [WEIGHTS.get(kind, 15) for kind in by_kind])[0]
            event = choose.choice(by_kind[kind])
            world = self._step(world, event, trace)
            trace, code = (trace, event), hash((code, event))
            self.seen.add(code)
            if number % look_every == 0:
                self._look(world, trace)
        self._look(world, trace)

    def _step(self, world: World, event: Event, trace: Trace) -> World:
        self.kinds[event[0]] += 1
        try:
            after = world.apply(event)
            after.check()
        except AssertionError as error:
            raise self._found(error, (trace, event)) from error
        return after

    def _look(self, world: World, trace: Trace) -> None:
        """Checks what is costlier to look at than a step is to take."""
        try:
            world.settle()
            world.check_stale()
        except AssertionError as error:
            raise self._found(error, trace) from error

    def _found(self, error: AssertionError, trace: Trace) -> Violation:
        """With the events that led there, but those that do not matter."""
        events: list[Event] = []
        while trace:
            trace, event = trace
            events.insert(0, event)
        for index in reversed(range(len(events))):
            shorter = events[:index] + events[index + 1 :]
            if self._fails(shorter):
                events = shorter
        lines = [" ".join(map(str, event)) for event in events]
        return Violation("\n".join([str(error), repr(self.job), *lines]))

    def _fails(self, events: list[Event]) -> bool:
        world = World.begin(self.job)
        try:
            for event in events:
                if event not in world.events():
                    return False
                world = world.apply(event)
                world.check()
            world.settle()
            world.check_stale()
        except AssertionError:
            return True
        return False


class CommitsEarly(Ledger):
    """After it has heard one node too few."""

    def _is_on_all(self, nodes: set[int]) -> bool:
        return len(nodes | {self.position}) >= self.num_nodes - 1


class FreesAtPrepare(Ledger):
    """The slot of the last committed snapshot, once the next one is prepared."""

    def free_slot(self) -> int | None:
        index = self.in_flight
        if index is None or self.slots[index].phase != Phase.prepared:
            return super().free_slot()
        return next((other for other in range(self.num_slots) if other != index), None)


class AbortsAfterPrepare(Ledger):
    def abort(self, snapshot: SnapshotId) -> bool:
        index = self.find(snapshot)
        if index is not None and self.slots[index].phase == Phase.prepared:
            self.slots[index].phase = Phase.local
        return super().abort(snapshot)


class AdoptsLocal(Ledger):
    """It takes unfinished data over as prepared."""

    @classmethod
    def adopt(cls, generation: int, slots: list[Slot], aborted: SnapshotId | None = None) -> Self:
        for slot in slots:
            slot.phase = Phase.prepared if slot.phase == Phase.local else slot.phase
        return super().adopt(generation, slots, aborted)


class ForgetsWhatItGaveUp(Ledger):
    @classmethod
    def adopt(cls, generation: int, slots: list[Slot], aborted: SnapshotId | None = None) -> Self:
        return super().adopt(generation, slots)


class KeepsWhatIsNotWhole(Ledger):
    """In the slot of the snapshot that is gone on from."""

    def fence(self, generation: int, position: int, num_nodes: int, keep: Iterable[SnapshotId] = ()) -> list[int]:
        for slot in self.slots:
            if slot.snapshot in set(keep) and generation > self.generation:
                slot.phase = Phase.committed
        return super().fence(generation, position, num_nodes, keep)


class DropsWhatIsOlder(Ledger):
    """Than what is gone on from, before all nodes have that."""

    def fence(self, generation: int, position: int, num_nodes: int, keep: Iterable[SnapshotId] = ()) -> list[int]:
        if generation > self.generation:
            self.slots = [slot if slot.snapshot in set(keep) else Slot() for slot in self.slots]
        return super().fence(generation, position, num_nodes, keep)


class HearsTheDead(Ledger):
    """Reports of other generations."""

    def hear(self, report: Report) -> None:
        super().hear(dataclasses.replace(report, generation=self.generation))


BROKEN = [
    CommitsEarly,
    FreesAtPrepare,
    AbortsAfterPrepare,
    AdoptsLocal,
    ForgetsWhatItGaveUp,
    KeepsWhatIsNotWhole,
    DropsWhatIsOlder,
    HearsTheDead,
]


class PromisesBeforeItSeals(AgentCore):
    """Says that it has prepared before the checksums are written."""

    def _seal_if_whole(self, progress: Progress) -> list[Effect]:
        effects = super()._seal_if_whole(progress)
        is_whole = any(isinstance(effect, SealSlot) for effect in effects)
        report = dataclasses.replace(self.ledger.report(), prepared=progress.snapshot)
        return [SendReport(report), *effects] if is_whole else effects


class ForgetsItsGeneration(AgentCore):
    def configure(self, group: Group, keep: Iterable[SnapshotId]) -> list[Effect]:
        return [effect for effect in super().configure(group, keep) if not isinstance(effect, SaveGeneration)]


class KeepsToItselfWhatItGaveUp(AgentCore):
    def _write(self, why: str = "") -> list[Effect]:
        return [effect for effect in super()._write(why) if not isinstance(effect, SaveAborted)]


class ReadsWithoutAPin(AgentCore):
    """While a snapshot is written to disk."""

    def persist_newest(self) -> list[Effect]:
        effects = super().persist_newest()
        if self.persists.job is not None:
            self.ledger.release(self.persists.job.snapshot)
        return effects


BROKEN_CORES = [
    PromisesBeforeItSeals,
    ForgetsItsGeneration,
    KeepsToItselfWhatItGaveUp,
    ReadsWithoutAPin,
]


def explore(small: list[Job], num_walks: int, look_every: int) -> int:
    """All of the `small` jobs, and walks through jobs of all shapes. Returns the number of different interleavings."""
    total, kinds = 0, Counter()
    for job in small:
        explorer = Explorer(job)
        assert explorer.search(2_000_000, look_every), "it was to be small"
        total += len(explorer.seen)
        print(f"{job}: all {explorer.num_states} states, {len(explorer.seen)} interleavings")
    for num_nodes, num_parity_shards, num_slots in SHAPES:
        explorer = Explorer(
            dataclasses.replace(LONG, num_nodes=num_nodes, num_parity_shards=num_parity_shards, num_slots=num_slots)
        )
        for seed in range(num_walks):
            explorer.walk(seed, look_every=2 * look_every)
        total += len(explorer.seen)
        kinds += explorer.kinds
    print(f"{total} interleavings in all; events of the walks: {dict(kinds)}")
    assert kinds.keys() == KINDS
    return total


@pytest.mark.slow
def test_the_protocol_keeps_its_promises_in_some_orders_of_events() -> None:
    assert explore(SMALL, num_walks=2, look_every=16) >= 100_000


@pytest.mark.slow
@pytest.mark.full
def test_the_protocol_keeps_its_promises_in_any_order_of_events() -> None:
    assert explore(SMALL, num_walks=25, look_every=8) >= 150_000


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_protocol_keeps_its_promises_in_many_more() -> None:
    assert explore(SMALL + LARGER, num_walks=600, look_every=4) >= 1_500_000


@pytest.mark.slow
@pytest.mark.parametrize("ledger", BROKEN)
def test_a_broken_protocol_is_caught(ledger: type[Ledger]) -> None:
    explorer = Explorer(dataclasses.replace(LONG, ledger=ledger))
    with pytest.raises(Violation):
        for seed in range(3000):
            explorer.walk(seed, look_every=8)


@pytest.mark.slow
@pytest.mark.parametrize("core", BROKEN_CORES)
def test_a_broken_core_is_caught(core: type[AgentCore]) -> None:
    explorer = Explorer(dataclasses.replace(LONG, core=core))
    with pytest.raises(Violation):
        for seed in range(3000):
            explorer.walk(seed, look_every=8)


def test_states_share_nothing_that_changes() -> None:
    """Else what happens in one would happen in another, and what is explored were not what can be."""
    world = World.begin(Job(2, 1, 2))
    for event in [("agree", -1), ("begin", 0), ("begin", 1), ("local", 0), ("local", 1), ("prepare", 0), ("pin", 1)]:
        world = world.apply(event)
        for core in [node.core for node in world.nodes]:
            other = clone_core(core)
            for one, two in ((core, other), (core.ledger, other.ledger), (core.persists, other.persists)):
                for name, value in vars(one).items():
                    is_constant = value is None or isinstance(value, int | float | tuple | Report | Group)
                    assert is_constant or vars(two)[name] is not value, name


@pytest.mark.slow
def test_an_agent_that_writes_down_in_another_order_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for message in ("_sync", "configure"):
        in_order = getattr(AgentCore, message)
        monkeypatch.setattr(AgentCore, message, lambda *arguments, of=in_order: of(*arguments)[::-1])
    explorer = Explorer(Job(2, 1, 2, max_pins=0))
    with pytest.raises(Violation):
        for seed in range(1000):
            explorer.walk(seed, look_every=8)
