"""The places of a job's nodes in a Ray cluster: bundles of placement groups, each on a node of its own.

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
"""What a node has to give its part of the first reservation to a group of its own; another job may be faster."""


@dataclass(eq=False)
class Place:
    group: PlacementGroup
    give_up_at: float = inf
    avoids: frozenset[str] = frozenset()
    """Nodes where it must not be."""
    node_id: str | None = None
    """Where it is; None: nowhere yet."""

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0)


class Places:
    """Args:
    bundle: what is needed on a node.
    num_nodes: the fewest nodes.
    """

    def __init__(self, bundle: Mapping[str, float], num_nodes: int) -> None:
        self._bundle = dict(bundle)
        self._first: PlacementGroup | None = placement_group([self._bundle] * num_nodes, strategy="STRICT_SPREAD")
        self._asked: list[Place] = []
        self.places: list[Place] = []

    @property
    def has_first(self) -> bool:
        """Whether the fewest nodes were had."""
        return self._first is None

    @property
    def num_swapping(self) -> int:
        """Nodes of the first reservation that are about to be places of their own."""
        return sum(place.give_up_at < inf for place in self._asked)

    def look(self, alive: Container[str]) -> None:
        """Sees what has been placed, as far as those nodes are alive."""
        if self._first is not None:
            table = placement_group_table(self._first)
            if table["state"] != "CREATED":
                return
            give_up_at = time.monotonic() + SWAP_S
            for node_id in table["bundles_to_node_id"].values():
                self._asked.append(Place(self._group({NODE_LABEL: node_id}), give_up_at))
            remove_placement_group(self._first)
            self._first = None
        for place in list(self._asked):
            table = placement_group_table(place.group)
            if table["state"] == "CREATED" and table["bundles_to_node_id"][0] in alive:
                place.node_id = table["bundles_to_node_id"][0]
                self._asked.remove(place)
                self.places.append(place)
            elif time.monotonic() > place.give_up_at:
                self._take_back(place)

    def ask_for_one(self, avoid: frozenset[str]) -> None:
        """Asks for one more place, unless that is asked already, on a node other than those."""
        for place in [place for place in self._asked if place.give_up_at == inf]:
            if place.avoids == avoid:
                return
            self._take_back(place)
        selector = {NODE_LABEL: f"!in({','.join(sorted(avoid))})"} if avoid else {}
        self._asked.append(Place(self._group(selector), avoids=avoid))

    def _group(self, selector: dict[str, str]) -> PlacementGroup:
        return placement_group([self._bundle], strategy="STRICT_SPREAD", bundle_label_selector=[selector])

    def take_back(self) -> None:
        """Asks for no more."""
        for place in [place for place in self._asked if place.give_up_at == inf]:
            self._take_back(place)

    def _take_back(self, place: Place) -> None:
        self._asked.remove(place)
        remove_placement_group(place.group)

    def give_back(self, place: Place) -> None:
        self.places.remove(place)
        remove_placement_group(place.group)

    def close(self) -> None:
        groups = [place.group for place in (*self._asked, *self.places)]
        for group in groups if self._first is None else [*groups, self._first]:
            remove_placement_group(group)
