"""Reserves nodes of a Ray cluster for a job: bundles of placement groups, each on a node of its own.

The fewest nodes that the job goes on with are first reserved as one STRICT_SPREAD group, as a whole or not at all, so
that two jobs do not hold half of what each needs. Then each of these nodes, and every further one, gets a group of one
bundle in its stead, which can be given back by itself. Of a group that loses nodes Ray moves all lost parts together,
which it begins after some 15 s of silence, and while there are too few nodes no other group is placed.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import inf

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODE_LABEL = "ray.io/node-id"
SWAP_S = 10.0
"""How long a node may take to give its part of the first reservation to its own group; another job may be faster."""


@dataclass(eq=False)
class Reservation:
    group: PlacementGroup
    give_up_at: float = inf
    avoids: frozenset[str] = frozenset()
    """Nodes where it must not be."""
    node_id: str | None = None
    """The node where it is; None: nowhere yet."""

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0)


class Reservations:
    """Args:
    bundle: what is needed on a node.
    num_nodes: the fewest nodes.
    """

    def __init__(self, bundle: Mapping[str, float], num_nodes: int) -> None:
        self._bundle = dict(bundle)
        self._first: PlacementGroup | None = placement_group([self._bundle] * num_nodes, strategy="STRICT_SPREAD")
        self._asked: list[Reservation] = []
        self.placed: list[Reservation] = []

    @property
    def has_first(self) -> bool:
        """The fewest nodes have been reserved."""
        return self._first is None

    @property
    def num_swapping(self) -> int:
        """Counts nodes of the first reservation that are about to get one of their own."""
        return sum(reservation.give_up_at < inf for reservation in self._asked)

    def look(self, alive: Container[str]) -> None:
        """Sees what has been placed, as far as those nodes are alive."""
        if self._first is not None:
            table = placement_group_table(self._first)
            if table["state"] != "CREATED":
                return
            give_up_at = time.monotonic() + SWAP_S
            for node_id in table["bundles_to_node_id"].values():
                self._asked.append(Reservation(self._group({NODE_LABEL: node_id}), give_up_at))
            remove_placement_group(self._first)
            self._first = None
        for reservation in list(self._asked):
            table = placement_group_table(reservation.group)
            if table["state"] == "CREATED" and table["bundles_to_node_id"][0] in alive:
                reservation.node_id = table["bundles_to_node_id"][0]
                self._asked.remove(reservation)
                self.placed.append(reservation)
            elif time.monotonic() > reservation.give_up_at:
                self._take_back(reservation)

    def ask_for_one(self, avoid: frozenset[str]) -> None:
        """Asks for one more node, other than those, unless that is asked already."""
        for reservation in [reservation for reservation in self._asked if reservation.give_up_at == inf]:
            if reservation.avoids == avoid:
                return
            self._take_back(reservation)
        selector = {NODE_LABEL: f"!in({','.join(sorted(avoid))})"} if avoid else {}
        self._asked.append(Reservation(self._group(selector), avoids=avoid))

    def _group(self, selector: dict[str, str]) -> PlacementGroup:
        return placement_group([self._bundle], strategy="STRICT_SPREAD", bundle_label_selector=[selector])

    def take_back(self) -> None:
        """Asks for no more."""
        for reservation in [reservation for reservation in self._asked if reservation.give_up_at == inf]:
            self._take_back(reservation)

    def _take_back(self, reservation: Reservation) -> None:
        self._asked.remove(reservation)
        remove_placement_group(reservation.group)

    def give_back(self, reservation: Reservation) -> None:
        self.placed.remove(reservation)
        remove_placement_group(reservation.group)

    def close(self) -> None:
        groups = [reservation.group for reservation in (*self._asked, *self.placed)]
        for group in groups if self._first is None else [*groups, self._first]:
            remove_placement_group(group)
