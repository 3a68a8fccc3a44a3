"""The places of a job's nodes in a Ray cluster: bundles of placement groups, each on a node of its own.

The fewest nodes that the job goes on with are one group that is placed as a whole or not at all, so that two jobs do
not hold half of what each needs. Every further node, and every replacement, is a group of one bundle that avoids the
nodes in use: Ray gives a killed node up only after some 15 s of silence, and moves its bundle to another only then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@dataclass(eq=False)
class Place:
    group: PlacementGroup
    bundle: int
    is_extra: bool
    """Whether it is a group by itself, which can be given back."""
    node_id: str | None = None
    """Where it is; None: nowhere yet."""
    num_failures: int = 0
    """Of actors that did not start here, in a row."""
    retry_at: float = 0.0

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, self.bundle)


class Places:
    """Args:
    bundle: what is needed on a node.
    num_nodes: the fewest nodes.
    """

    def __init__(self, bundle: Mapping[str, float], num_nodes: int) -> None:
        self._bundle = dict(bundle)
        self._group = placement_group([self._bundle] * num_nodes, strategy="STRICT_SPREAD")
        self.places = [Place(self._group, number, is_extra=False) for number in range(num_nodes)]
        self._asked: Place | None = None
        self._avoided: frozenset[str] = frozenset()

    def look(self, alive: Mapping[str, object]) -> None:
        """Renews where places are, as far as those nodes are alive."""
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        for place in self.places:
            if not place.is_extra:
                node_id = nodes[place.bundle] if nodes[place.bundle] in alive else None
                if node_id != place.node_id:
                    place.node_id, place.num_failures, place.retry_at = node_id, 0, 0.0
        asked = self._asked
        if asked is not None:
            node_id = placement_group_table(asked.group)["bundles_to_node_id"][0]
            if node_id in alive:
                asked.node_id = node_id
                self.places.append(asked)
                self._asked = None

    def ask_for_one(self, avoid: frozenset[str]) -> None:
        """Asks for one more place, unless that is asked already, on a node other than those."""
        if self._asked is not None:
            if self._avoided == avoid:
                return
            self.take_back()
        selector = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"} if avoid else {}
        group = placement_group([self._bundle], strategy="STRICT_SPREAD", bundle_label_selector=[selector])
        self._asked, self._avoided = Place(group, 0, is_extra=True), avoid

    def take_back(self) -> None:
        """Asks for no more."""
        if self._asked is not None:
            remove_placement_group(self._asked.group)
            self._asked = None

    def give_back(self, place: Place) -> None:
        assert place.is_extra, "a group is given back as a whole"
        self.places.remove(place)
        remove_placement_group(place.group)

    def close(self) -> None:
        self.take_back()
        for group in {place.group for place in self.places}:
            remove_placement_group(group)
