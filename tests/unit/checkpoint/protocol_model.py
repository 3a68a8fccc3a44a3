"""A job of n nodes around the cores of real agents: what may happen to it, event by event, and what must then hold.

The network is the set of all reports ever sent: any may arrive anywhere, at any time, often or never. Trainers are what
they agreed on and have still to do. A state is not changed: an event makes the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from protocol_node import FOREVER, Job, Node, Part, Violation, layout_of, step_of

from windlass.checkpoint.agent.ledger import IN_FLIGHT, WHOLE, Phase, Report, SnapshotId
from windlass.checkpoint.snapshot.plan import RecoveryPlan, plan_recovery

Event = tuple[Any, ...]
"""(kind, node or -1, ...)."""
MAX_EFFECTS = {"begin": 2, "local": 3, "prepare": 3, "hear": 2, "abort": 4, "rebuild": 3}
"""How many effects an event may have, and for what trainers ask, its answer; a fence may write every slot, and more."""
_sound: set[tuple[Any, ...]] = set()
"""States that `World.check` has found in order: by what is written down alone, not by how it came about."""


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
    keepers: frozenset[int] = frozenset()
    """The nodes that hold `floor`."""
    num_kills: int = 0
    num_pins: int = 0
    max_effects: int = FOREVER
    """After so many of the event's the agent is killed."""

    @staticmethod
    def begin(job: Job) -> World:
        states: dict[tuple[Any, ...], Node] = {}
        nodes = [Node(job, position, states).settled() for position in range(job.num_nodes)]
        world = World(job, nodes)
        for position in range(job.num_nodes):
            world._change(position, "fence", world.generation, None)
        return world

    def key(self) -> tuple[Any, ...]:
        return (
            tuple(map(id, self.nodes)),  # equal ones are one
            frozenset(self.sent),
            (self.generation, self.agreed, self.to_begin, self.to_abort, self.finished),
            (self.to_fence, self.is_training),
            (self.restored, self.floor, self.num_lost, self.keepers, self.num_kills, self.num_pins),
        )

    def clone(self) -> World:
        world = object.__new__(World)
        world.__dict__ = self.__dict__.copy()
        world.nodes = self.nodes.copy()
        return world

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
                newest = self.nodes[index].committed
                if newest is not None and not core.persists.knows(newest):
                    yield ("pin", index)
            if self.num_kills < job.max_kills:
                yield ("kill", index)
            if self.num_lost < job.num_parity_shards or index not in self.keepers:
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
        """Events that change a node, in steps that the agent may be killed between."""
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
        return is_whole and all(node.is_free for node in self.nodes)

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

    def _change(self, index: int, event: str, *args: Any) -> bool:
        """Puts a node into the state after an event; False if the agent is killed in its midst."""
        before = self.nodes[index]
        node, sent, is_alive = before.after(event, *args, max_effects=self.max_effects)
        self.nodes[index] = node
        self.sent += tuple(report for report in sent if report not in self.sent)
        self.num_kills += not is_alive
        new = node.committed if node.committed != before.committed and self.is_training else None
        if new is not None and (self.floor is None or new > self.floor):
            # The first commit of it anywhere. Once a recovery has asked what there is, that decides.
            self.floor, self.keepers = new, frozenset(self.up())
            self.num_lost = self.job.num_nodes - len(self.keepers)
        return is_alive

    def _agree(self) -> None:
        is_first = self.agreed is None or self.agreed.generation != self.generation
        number = 1 if is_first or self.agreed is None else self.agreed.number + 1
        self.agreed = SnapshotId(self.generation, number)
        self.to_begin = frozenset(range(self.job.num_nodes))
        self.to_abort = self.finished = frozenset()

    def _begin(self, index: int) -> None:
        self.to_begin -= {index}
        before = self.nodes[index]
        if not self._change(index, "begin", self.agreed):
            self.to_abort |= {index}
        if self.job.num_slots == 1 and self.nodes[index].headers != before.headers:
            self.floor = None  # the weaker promise: nothing is kept from a begin to the next commit

    def _abort(self, index: int) -> None:
        self.to_begin, self.to_abort = self.to_begin - {index}, self.to_abort - {index}
        if not self._change(index, "abort", self.agreed):
            self.to_abort |= {index}

    def _local(self, index: int) -> None:
        assert self.agreed is not None
        self._change(index, "local", self.agreed)
        if self.nodes[index].phase_of(self.agreed) == Phase.local:
            self.finished |= {index}

    def _prepare(self, index: int) -> None:
        self._change(index, "prepare", self.agreed)

    def _hear(self, index: int, report: Report) -> None:
        self._change(index, "hear", report)

    def _pin(self, index: int) -> None:
        self._change(index, "pin")
        self.num_pins += 1

    def _unpin(self, index: int) -> None:
        self._change(index, "unpin")

    def _kill(self, index: int) -> None:
        self.num_kills += 1
        self._change(index, "kill")

    def _killed(self, index: int, max_effects: int, event: Event) -> None:
        """In the midst of `event`, after so many effects of it."""
        self.max_effects = max_effects
        kind, _, *rest = event
        getattr(self, f"_{kind}")(index, *rest)
        self.max_effects = FOREVER

    def _lose(self, index: int) -> None:
        self._change(index, "lose")
        self.num_lost += index in self.keepers
        self.keepers -= {index}

    def _crash(self) -> None:
        """All trainers die. New ones come, with empty nodes for those lost, and ask what there is."""
        self.generation += 1
        for index, node in enumerate(self.nodes):
            if not node.is_up:
                self.nodes[index] = Node(self.job, index, node.states).settled()
        plan = self.plan()
        self.restored = None if plan is None else plan.snapshot
        self.is_training, self.to_fence = False, frozenset(range(self.job.num_nodes))

    def _fence(self, index: int) -> None:
        if self._change(index, "fence", self.generation, self.restored):
            self.to_fence -= {index}
        self._resume_if_ready()

    def _rebuild(self, index: int) -> None:
        self._change(index, "rebuild", self.restored)
        self._resume_if_ready()

    def _resume_if_ready(self) -> None:
        """Trainers go on once all nodes have what they go on from: only then may what is older be overwritten."""
        is_ready = self.restored is None or all(node.phase_of(self.restored) in WHOLE for node in self.nodes)
        if self.to_fence or not is_ready or len(self.up()) < self.job.num_nodes:
            return
        self.is_training, self.floor, self.num_lost = True, self.restored, 0
        self.agreed = None
        self.to_begin = self.to_abort = self.finished = frozenset()
        self.keepers = frozenset() if self.restored is None else frozenset(range(self.job.num_nodes))

    # --- What must hold. ---

    def check_stale(self) -> None:
        """Nothing of an older generation changes anything."""
        for node in self.nodes:
            generation = node.core.ledger.generation
            reports = tuple(report for report in self.sent if report.generation != generation)
            old = tuple(s for s in (self.agreed, self.restored) if s is not None and s.generation != generation)
            node.after("stale", reports, old)

    def settle(self) -> None:
        """If from here on nobody dies and all messages arrive, all comes to its end. Raises Violation if it hangs."""
        world = self.clone()
        if not (world.is_training and len(world.up()) == world.job.num_nodes):
            world._recover()
        for is_late in (False, True):
            for _ in range(3):
                world._finish(is_late)
                for index, other in itertools.permutations(range(world.job.num_nodes), 2):
                    world._hear(other, world.nodes[index].report)
        for node in world.nodes:
            if not node.is_free:
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
        """Nodes do what they do on their own, and give up what is not prepared after a long time."""
        for index in range(self.job.num_nodes):
            while self.nodes[index].core.persists.job is not None:
                self._unpin(index)
            if index in self.to_begin:
                self._begin(index)
            if index in self.to_abort:
                self._abort(index)
            if self.agreed is not None and self.nodes[index].phase_of(self.agreed) == Phase.writing:
                self._local(index)
        is_whole = len(self.finished) == self.job.num_nodes
        for index, node in enumerate(self.nodes):
            if self.agreed is not None and node.phase_of(self.agreed) == Phase.local and is_whole:
                self._prepare(index)
            elif is_late:
                self._change(index, "wait")

    def plan(self, gone: tuple[int, ...] = ()) -> RecoveryPlan | None:
        """The snapshot that trainers would go on from, if the nodes `gone` were lost."""
        nodes = [node.held() if node.is_up and node.position not in gone else () for node in self.nodes]
        return plan_recovery(nodes, FOREVER)

    def check(self) -> None:
        """Asserts that what was committed is there, whichever nodes that the job can spare are lost next."""
        job, up = self.job, self.up()
        spare = job.num_parity_shards - self.num_lost if self.floor is not None else 0
        slots = tuple(node.disk_key for node in self.nodes)
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
