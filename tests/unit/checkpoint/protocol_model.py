"""A job of n nodes around the cores of real agents: what may happen to it, event by event, and what must then hold.

The network is the set of all reports ever sent: any may arrive anywhere, at any time, often or never. Trainers are what
they agreed on and have still to do. A state is not changed: an event makes the next one.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from protocol_node import FOREVER, Job, Node, Part, Violation, group_of, header_of, layout_of, step_of

from windlass.checkpoint.agent.core import GIVE_UP_S
from windlass.checkpoint.agent.effects import Effect
from windlass.checkpoint.agent.ledger import IN_FLIGHT, WHOLE, Busy, Phase, Report, SnapshotId, Stale
from windlass.checkpoint.snapshot.plan import RecoveryPlan, plan_recovery

Event = tuple[Any, ...]
"""(kind, node or -1, ...)."""
MAX_EFFECTS = {"begin": 2, "local": 3, "prepare": 3, "hear": 2, "abort": 4, "rebuild": 3}
"""How many effects an event may have, and for what trainers ask, its answer; a fence may write every slot, and more."""
_sound: set[tuple[Any, ...]] = set()
"""What `World.check` has found in order: it depends on what is written down alone, not on how it came about."""


@dataclass
class World:
    """A state of the job. `apply` makes the next one; this one stays as it is."""

    job: Job
    nodes: list[Node]
    generation: int = 1
    """That the newest trainers have begun. An agent that was just started is of generation 0."""
    sent: tuple[Report, ...] = ()
    """By anybody, at any time."""
    agreed: SnapshotId | None = None
    """The newest snapshot that trainers agreed to take, because all nodes had a free slot."""
    to_begin: frozenset[int] = frozenset()
    to_abort: frozenset[int] = frozenset()
    """The nodes whose agent was killed before it answered: trainers there give `agreed` up at the next agent."""
    finished: frozenset[int] = frozenset()
    """The nodes whose data of `agreed` has been whole: the others may have it."""
    to_fence: frozenset[int] = frozenset()
    is_training: bool = True
    restored: SnapshotId | None = None
    floor: SnapshotId | None = None
    """The newest snapshot that was committed, or recovered on all nodes: nothing older will do."""
    num_lost: int = 0
    """How many nodes that held `floor` were lost since."""
    num_kills: int = 0
    num_pins: int = 0
    effects_left: int = FOREVER
    """After so many the agent is killed."""
    touched: set[int] = field(default_factory=set)

    @staticmethod
    def begin(job: Job) -> World:
        world = World(job, [Node(job, position) for position in range(job.num_nodes)])
        for position, node in enumerate(world.nodes):
            node.do(node.core.configure(group_of(job, world.generation, position), []), [])
        return world

    def key(self) -> tuple[Any, ...]:
        return (
            tuple(node.key() for node in self.nodes),
            frozenset(self.sent),
            (self.generation, self.agreed, self.to_begin, self.to_abort, self.finished),
            (self.to_fence, self.is_training),
            (self.restored, self.floor, self.num_lost, self.num_kills, self.num_pins),
        )

    def clone(self) -> World:
        world = copy.copy(self)
        world.nodes, world.touched = list(self.nodes), set()
        return world

    def node(self, index: int) -> Node:
        """Ours to change."""
        if index not in self.touched:
            self.nodes[index] = self.nodes[index].clone()
            self.touched.add(index)
        return self.nodes[index]

    def up(self) -> list[int]:
        return [index for index, node in enumerate(self.nodes) if node.is_up]

    # --- What may happen. ---

    def events(self) -> Iterator[Event]:
        job, up, agreed = self.job, self.up(), self.agreed
        number = agreed.number if agreed is not None and agreed.generation == self.generation else 0
        if self._may_agree(up) and number < job.max_snapshots:
            yield ("agree", -1)
        for index in up:
            for event in self._node_events(index):
                yield event
                if self.num_kills < job.max_kills:
                    is_short = event[0] == "local" and job.num_parity_shards > 0
                    for num_effects in range(1 if is_short else MAX_EFFECTS.get(event[0], job.num_slots + 2)):
                        yield ("killed", index, num_effects, event)
            core = self.nodes[index].core
            if core.persists.job is not None:
                yield ("unpin", index)
            if self.num_pins < job.max_pins and core.group is not None:
                newest = core.ledger.committed
                if newest is not None and not core.persists.knows(newest):
                    yield ("pin", index)
            if self.num_kills < job.max_kills:
                yield ("kill", index)
            if self.num_lost < job.num_parity_shards or not self.nodes[index].holds_floor:
                yield ("lose", index)
        if self.generation <= job.max_crashes:
            yield ("crash", -1)
        if not self.is_training and not self.to_fence and self.restored is not None:
            for index in [index for index in up if self._may_rebuild(index)]:
                yield ("rebuild", index)
                if self.num_kills < job.max_kills:
                    yield from (
                        ("killed", index, number, ("rebuild", index)) for number in range(MAX_EFFECTS["rebuild"])
                    )

    def _node_events(self, index: int) -> Iterator[Event]:
        """What changes a ledger, in steps that the agent may be killed between."""
        node, agreed, job = self.nodes[index], self.agreed, self.job
        if agreed is not None:
            phase = node.phase_of(agreed)
            if index in self.to_begin:
                yield ("begin", index)
            if index in self.to_begin | self.to_abort or phase in IN_FLIGHT:
                yield ("abort", index)
            if phase == Phase.writing:
                yield ("local", index)
            if phase == Phase.local and len(self.finished) == job.num_nodes:
                yield ("prepare", index)
        for report in self.sent:
            if report.generation == node.core.ledger.generation and report.position != index:
                yield ("hear", index, report)
        if index in self.to_fence:
            yield ("fence", index)

    def _may_agree(self, up: list[int]) -> bool:
        is_whole = self.is_training and not self.to_begin | self.to_abort and len(up) == self.job.num_nodes
        return is_whole and all(node.core.ledger.free_slot() is not None for node in self.nodes)

    def _may_rebuild(self, index: int) -> bool:
        assert self.restored is not None
        holders = [node for node in self.nodes if node.is_up and node.phase_of(self.restored) in WHOLE]
        return self.nodes[index].phase_of(self.restored) == Phase.empty and len(holders) >= self.job.needed

    # --- What happens then. ---

    def apply(self, event: Event) -> World:
        """The state after `event`. Raises Violation if it breaks a promise."""
        world = self.clone()
        kind, index, *rest = event
        getattr(world, f"_{kind}")(*([index] if index >= 0 else []), *rest)
        return world

    def _do(self, index: int, effects: list[Effect]) -> bool:
        """Does what the core of a node asks for, unless the agent is killed before all of it is done: then False."""
        sent: list[Report] = []
        self.effects_left -= self.nodes[index].do(effects, sent, self.effects_left)
        self._send(sent)
        if self.effects_left:
            return True
        self._kill(index)
        return False

    def _send(self, reports: list[Report]) -> None:
        self.sent += tuple(report for report in reports if report not in self.sent)

    def _agree(self) -> None:
        is_first = self.agreed is None or self.agreed.generation != self.generation
        number = 1 if is_first or self.agreed is None else self.agreed.number + 1
        self.agreed = SnapshotId(self.generation, number)
        self.to_begin = frozenset(range(self.job.num_nodes))
        self.to_abort = self.finished = frozenset()

    def _begin(self, index: int) -> None:
        assert self.agreed is not None
        node, self.to_begin = self.node(index), self.to_begin - {index}
        before = [(slot.snapshot, slot.phase) for slot in node.core.ledger.slots]
        read = node.core.persists.job
        try:
            effects = node.core.begin(header_of(self.job, self.agreed, index))
        except (Busy, Stale):
            effects = self._give_up(node)
        else:
            taken = before[node.core.slot_of(header_of(self.job, self.agreed, index))][0]
            newest = max((s for s, phase in before if phase == Phase.committed and s is not None), default=None)
            if self.job.num_slots > 1 and newest is not None and taken == newest:
                raise Violation("a snapshot was begun over the newest that is committed")
            if read is not None and taken == read.snapshot:
                raise Violation("a snapshot was begun over one that is being written to disk")
            if self.job.num_slots == 1:
                self.floor = None  # the weaker promise: nothing is kept from a begin to the next commit
        if not self._do(index, effects):
            self.to_abort |= {index}

    def _abort(self, index: int) -> None:
        self.to_begin, self.to_abort = self.to_begin - {index}, self.to_abort - {index}
        if not self._do(index, self._give_up(self.node(index))):
            self.to_abort |= {index}

    def _give_up(self, node: Node) -> list[Effect]:
        assert self.agreed is not None
        before = node.memory()
        was_prepared = node.phase_of(self.agreed) in WHOLE
        effects = node.core.give_up(self.agreed, "it is to be")
        is_other = self.agreed.generation != node.core.ledger.generation
        if (was_prepared or is_other) and (effects or node.memory() != before):
            raise Violation("a snapshot was given up that others may have committed, or of another generation")
        return effects

    def _local(self, index: int) -> None:
        """The data of the node's only rank is there. The core may refuse it, as it is of an older generation."""
        assert self.agreed is not None
        node = self.node(index)
        before = node.memory()
        self._fill(node, self.agreed, has_parity=self.job.num_parity_shards == 0)
        try:
            self._tell(index, node.core.copied, self.agreed, index)
        except Stale:
            if node.memory() != before or self.agreed.generation == node.core.ledger.generation:
                raise Violation("what was refused had an effect") from None
        if self.nodes[index].phase_of(self.agreed) == Phase.local:
            self.finished |= {index}

    def _prepare(self, index: int) -> None:
        """The data of all others is there."""
        assert self.agreed is not None
        node = self.node(index)
        self._fill(node, self.agreed, has_parity=True)
        progress = node.core.progress
        owed = {} if progress is None else progress.owed.copy()
        while owed:
            position, num_blocks = owed.popitem()
            num_whole = 0 if owed else self.job.num_parity_shards
            self._tell(index, node.core.parity_arrived, self.agreed, position, num_blocks, num_whole)

    def _fill(self, node: Node, snapshot: SnapshotId, has_parity: bool) -> None:
        for index, part in enumerate(node.parts):
            if part is not None and part.snapshot == snapshot:
                node.parts[index] = Part(snapshot, has_data=True, has_parity=has_parity)

    def _hear(self, index: int, report: Report) -> None:
        self._tell(index, self.node(index).core.hear, report)

    def _tell(self, index: int, message: Callable[..., list[Effect]], *args: Any) -> None:
        """Gives the core of a node a message that may make it commit, and does what comes of it."""
        node = self.nodes[index]
        before = node.core.ledger.committed
        self._do(index, message(*args))
        self._note_commit(node, before)

    def _note_commit(self, node: Node, before: SnapshotId | None) -> None:
        """The first commit of a snapshot anywhere. Once a recovery has asked what there is, it decides."""
        committed = node.core.ledger.committed
        is_new = committed is not None and committed != before and (self.floor is None or committed > self.floor)
        if self.is_training and is_new:
            self.floor, self.num_lost = committed, self.job.num_nodes - len(self.up())
            for other in self.up():
                self.node(other).holds_floor = True

    def _pin(self, index: int) -> None:
        """Somebody takes the machine away, say: what is committed is to be written to disk."""
        self._do(index, self.node(index).core.persist_newest())
        self.num_pins += 1

    def _unpin(self, index: int) -> None:
        sent: list[Report] = []
        self.node(index).finish_persist(sent)
        self._send(sent)

    def _kill(self, index: int) -> None:
        self.num_kills += 1
        self.effects_left = FOREVER
        sent: list[Report] = []
        self.node(index).restart(self.job, sent)
        self._send(sent)

    def _killed(self, index: int, num_effects: int, event: Event) -> None:
        """In the midst of `event`, after so many effects of it."""
        self.effects_left = num_effects
        kind, _, *rest = event
        getattr(self, f"_{kind}")(index, *rest)
        if self.effects_left < FOREVER:
            self._kill(index)

    def _lose(self, index: int) -> None:
        node = self.node(index)
        self.num_lost += node.holds_floor
        node.is_up = node.holds_floor = False

    def _crash(self) -> None:
        """All trainers die. New ones come, with empty nodes for those lost, and ask what there is."""
        self.generation += 1
        for index, node in enumerate(self.nodes):
            if not node.is_up:
                self.nodes[index] = Node(self.job, index)
                self.touched.add(index)
        plan = self.plan()
        self.restored = None if plan is None else plan.snapshot
        self.is_training, self.to_fence = False, frozenset(range(self.job.num_nodes))

    def _fence(self, index: int) -> None:
        keep = [self.restored] if self.restored else []
        if self._do(index, self.node(index).core.configure(group_of(self.job, self.generation, index), keep)):
            self.to_fence -= {index}
        self._resume_if_ready()

    def _rebuild(self, index: int) -> None:
        assert self.restored is not None
        node, header = self.node(index), header_of(self.job, self.restored, index)
        try:
            effects = node.core.begin_rebuild(header)
        except Busy:
            raise Violation("there is no room to rebuild what is to be gone on from") from None
        if self._do(index, effects):
            self._fill(node, self.restored, has_parity=True)
            self._do(index, node.core.rebuilt(header))
        self._resume_if_ready()

    def _resume_if_ready(self) -> None:
        """Trainers go on once all nodes have what they go on from: only then may what is older be overwritten."""
        is_ready = self.restored is None or all(node.phase_of(self.restored) in WHOLE for node in self.nodes)
        if self.to_fence or not is_ready or len(self.up()) < self.job.num_nodes:
            return
        self.is_training, self.floor, self.num_lost = True, self.restored, 0
        self.agreed = None
        self.to_begin = self.to_abort = self.finished = frozenset()
        for index in range(self.job.num_nodes):
            self.node(index).holds_floor = self.restored is not None

    # --- What must hold. ---

    def check_stale(self) -> None:
        """Nothing of an older generation changes anything."""
        for index, node in enumerate(self.nodes):
            before, core = node.memory(), node.core
            generation = core.ledger.generation
            effects = [core.hear(report) for report in self.sent if report.generation != generation]
            old = [snapshot for snapshot in (self.agreed, self.restored) if snapshot is not None]
            for snapshot in [s for s in old if s.generation != generation]:
                effects += [core.give_up(snapshot, "it is old"), core.parity_arrived(snapshot, 0, 1, 1)]
                begun = header_of(self.job, snapshot, index)
                for message in (functools.partial(core.begin, begun), functools.partial(core.copied, snapshot, index)):
                    try:
                        message()
                    except Stale:
                        continue
                    raise Violation(f"{snapshot} was taken in generation {generation}")
            if any(effects) or node.memory() != before:
                raise Violation("a message of another generation had an effect")

    def settle(self) -> None:
        """If from here on nobody dies and all messages arrive, all comes to its end. Raises Violation if it hangs."""
        world = self.clone()
        if not (world.is_training and len(world.up()) == world.job.num_nodes):
            world._recover()
        for is_late in (False, True):
            for _ in range(3):
                world._finish(is_late)
                for index, node in enumerate(world.nodes):
                    for other in range(world.job.num_nodes):
                        if other != index:
                            world.node(other).do(world.node(other).core.hear(node.core.ledger.report()), [])
        for node in world.nodes:
            if node.core.ledger.free_slot() is None:
                raise Violation("a node waits forever for what will not come")

    def _recover(self) -> None:
        self._crash()
        for index in range(self.job.num_nodes):
            self._fence(index)
        for index in range(self.job.num_nodes):
            if not self.is_training and self._may_rebuild(index):
                self._rebuild(index)
        if not self.is_training:
            raise Violation(f"{self.restored} cannot be recovered")

    def _finish(self, is_late: bool) -> None:
        """What nodes do on their own. What is not prepared after a long time is given up."""
        for index in range(self.job.num_nodes):
            node = self.node(index)
            while node.core.persists.job is not None:
                node.finish_persist([])
            if index in self.to_begin:
                self._begin(index)
            if index in self.to_abort:
                self._abort(index)
            if self.agreed is not None and node.phase_of(self.agreed) == Phase.writing:
                self._local(index)
        is_whole = len(self.finished) == self.job.num_nodes
        for index, node in enumerate(self.nodes):
            if self.agreed is not None and node.phase_of(self.agreed) == Phase.local and is_whole:
                self._prepare(index)
            elif is_late:
                node.core.now = 2 * GIVE_UP_S
                self._do(index, node.core.tick())

    def plan(self, gone: tuple[int, ...] = ()) -> RecoveryPlan | None:
        """What trainers would go on from, if the nodes `gone` were lost."""
        nodes = [node.held() if node.is_up and node.position not in gone else () for node in self.nodes]
        return plan_recovery(nodes, FOREVER)

    def check(self) -> None:
        """Whichever nodes are lost next, as many as the job bears, what was committed is there to go on from."""
        job, up = self.job, self.up()
        spare = job.num_parity_shards - self.num_lost if self.floor is not None else 0
        slots = tuple(node.disk_key() for node in self.nodes)
        key = (slots, self.floor, spare, job.num_parity_shards)
        if key in _sound:
            return
        for gone in itertools.chain.from_iterable(itertools.combinations(up, size) for size in range(spare + 1)):
            plan = self.plan(gone)
            if plan is None:
                if self.floor is not None:
                    raise Violation(f"nothing is left of {self.floor} without the nodes {gone}")
                continue
            if self.floor is not None and plan.snapshot < self.floor:
                raise Violation(f"back to {plan.snapshot} past {self.floor} without the nodes {gone}")
            for position, index in plan.holders.items():
                if position != index or Part(plan.snapshot, True, True) not in self.nodes[index].parts:
                    raise Violation(f"node {index} says that it holds {plan.snapshot}, and does not")
            if (plan.step, plan.layout) != (step_of(plan.snapshot), layout_of(plan.snapshot)):
                raise Violation(f"steps or layouts are mixed in {plan}")
        _sound.add(key)
