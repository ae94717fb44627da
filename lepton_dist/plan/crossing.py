"""Which stages of a plan share layers across nodes: their sums travel over the network. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lepton_dist.plan.plan import Plan, Stage

OVERLAP_ROWS = 128
"""Tokens of a step from which sums between nodes may travel while others of them are computed (`engine.overlap`)."""


@dataclass(frozen=True)
class WideStage:
    """Stage number `stage_number` of replica number `replica`, whose tensor-parallel group lies on several nodes."""

    replica: int
    stage_number: int
    stage: Stage
    num_nodes: int

    @property
    def num_sums(self) -> int:
        """Sums of activations over the ranks in a step: two a layer, and one for the embedding."""
        return 2 * self.stage.layers + (1 if self.stage_number == 0 else 0)

    def __str__(self) -> str:
        return (
            f"replica {self.replica}, stage {self.stage_number}: tp {len(self.stage.ranks)} over {self.num_nodes} "
            f"nodes sends {self.num_sums} sums a step over the network"
        )


def wide_stages(plan: Plan, nodes: Sequence[int]) -> list[WideStage]:
    """The stages of a resolved plan that cross nodes; `nodes` is the node index of each rank."""
    return [
        WideStage(r, s, stage, num_nodes)
        for r, replica in enumerate(plan.replicas)
        for s, stage in enumerate(replica.stages)
        if (num_nodes := len({nodes[rank] for rank in stage.ranks})) > 1
    ]
