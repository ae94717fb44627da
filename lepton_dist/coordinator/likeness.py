"""Which replicas of a plan cost the same, so that they are priced once. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.plan.plan import Replica, Stage


def kind_numbers(cluster: Cluster) -> list[int]:
    """A number for the kind of each rank."""
    known: dict[object, int] = {}
    return [known.setdefault(profile.kind, len(known)) for profile in cluster.ranks]


class Likeness:
    """Compares replicas on a cluster, whose ranks are of these `kinds` (see `kind_numbers`)."""

    def __init__(self, cluster: Cluster, kinds: Sequence[int]) -> None:
        self._cluster, self._kinds = cluster, kinds

    def of(self, replica: Replica) -> object:
        """Equal for replicas of one price: kinds, layers, shares, and which ranks lie together."""
        if self._cluster.pairs:
            return replica
        first: dict[int, int] = {}
        return tuple(self._of_stage(stage, first) for stage in replica.stages)

    def _of_stage(self, stage: Stage, first: dict[int, int]) -> object:
        nodes = (self._cluster.ranks[rank].node for rank in stage.ranks)
        places = tuple(first.setdefault(node, len(first)) for node in nodes)
        return tuple(self._kinds[rank] for rank in stage.ranks), places, stage.layers, stage.shares
