"""Where each rank of a resolved plan sits, and what its seat holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lepton_dist.plan.axes import AxisSpans, ModelShape, shard_axes
from lepton_dist.plan.plan import Plan, Replica, Stage


@dataclass(frozen=True)
class Seat:
    """One rank's place: shard number `shard` of stage number `stage` of replica number `replica`."""

    rank: int
    replica: int
    stage: int
    shard: int
    layers: range
    spans: AxisSpans
    is_first: bool
    is_last: bool


def seats(plan: Plan, shape: ModelShape) -> Mapping[int, Seat]:
    """The seat of every rank that a resolved plan uses."""
    return {
        seat.rank: seat
        for r, replica in enumerate(plan.replicas)
        for s, stage in enumerate(replica.stages)
        for seat in _stage_seats(r, s, replica, stage, shape)
    }


def _stage_seats(r: int, s: int, replica: Replica, stage: Stage, shape: ModelShape) -> list[Seat]:
    spans = shard_axes(shape, stage.shares)
    is_last = s == len(replica.stages) - 1
    return [
        Seat(rank, r, s, index, stage.layer_range, spans[index], s == 0, is_last)
        for index, rank in enumerate(stage.ranks)
    ]


def has_replicas(of: Mapping[int, Seat]) -> bool:
    """Whether weights are held more than once, by seats of different replicas."""
    return len({seat.replica for seat in of.values()}) > 1
