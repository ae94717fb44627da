"""From a replica's shape to its stages: shares of unlike ranks, layers by speed within memory, and a price. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.partition import LayerCost, choose_shares, divide_layers
from lepton_dist.coordinator.pools import Pool, Seating, Shape, as_replica
from lepton_dist.coordinator.pricing import Target, rough_request_s
from lepton_dist.coordinator.stage_cost import StageCost
from lepton_dist.engine.work import StepWork
from lepton_dist.plan.axes import shard_axes
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.plan import Plan, Replica

_PROBE_LAYERS = 9


@dataclass(frozen=True)
class Built:
    """A shape with its layers and shares by stage, and the ranks it takes of each pool.

    `batch_s` says, for each number of sequences asked for, the seconds of its time that a request takes when as many
    of them as fit its memory run together; `latency_s` is that of a request alone, `cost_s` what the objective counts.
    """

    shape: Shape
    layers: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]
    use: tuple[int, ...]
    batch_s: dict[int, float]
    latency_s: float
    cost_s: float


@dataclass(frozen=True)
class _Held:
    """Bytes of a rank: with no layer, of a layer, and of a token's keys and values in a layer."""

    fixed: float
    layer: float
    layer_token: float
    usable: int

    def most_layers(self, tokens: int) -> int:
        return max(0, int((self.usable - self.fixed) / (self.layer + self.layer_token * tokens)))


class Builder:
    """Builds shapes over the pools of one layout. `least_missing` is by how many bytes the nearest miss missed."""

    def __init__(self, target: Target, pools: Sequence[Pool], kinds: Sequence[int]) -> None:
        self.least_missing: float | None = None
        self._target, self._pools, self._kinds = target, pools, kinds
        self._shares: dict[tuple[object, ...], tuple[float, ...]] = {}
        self._stages: dict[tuple[object, ...], tuple[float, float, list[_Held]]] = {}

    def build(self, shape: Shape, batches: Sequence[int], *, for_latency: bool = False) -> Built | None:
        """The shape with prices for these numbers of sequences; None when memory does not hold it."""
        groups = Seating(self._pools).seat(shape)
        if groups is None:
            return None
        # Shares by speed may ask more memory of the fast ranks than they have.
        ways = (True, False) if any(len({self._kinds[rank] for rank in ranks}) > 1 for ranks in groups) else (False,)
        found = [self._built(shape, groups, batches, for_latency, by_speed) for by_speed in ways]
        return min((item for item in found if item is not None), key=lambda item: item.cost_s, default=None)

    def _built(
        self, shape: Shape, groups: list[tuple[int, ...]], batches: Sequence[int], for_latency: bool, by_speed: bool
    ) -> Built | None:
        batch = 1 if for_latency else max(batches)
        found = self._divide(groups, batch, for_latency, by_speed)
        while found is None and batch > 1:
            batch //= 2
            found = self._divide(groups, batch, for_latency, by_speed)
        if found is None:
            return None
        layers, shares = found
        costs = self._costs(as_replica(groups, layers, shares))
        use = [0] * len(self._pools)
        for segment in shape:
            use[segment.pool] += segment.width * segment.count
        batch_s = {asked: rough_request_s(self._target, costs, min(asked, batch)) for asked in batches}
        alone_s = rough_request_s(self._target, costs, 1)
        cost_s = alone_s if for_latency else batch_s[max(batches)]
        return Built(shape, tuple(layers), tuple(shares), tuple(use), batch_s, alone_s, cost_s)

    def _costs(self, replica: Replica) -> CostModel:
        world = len(self._target.cluster.ranks)
        return self._target.costs(Plan(replicas=(replica,)).resolve(self._target.model.shape, world).replicas)

    def _divide(
        self, groups: list[tuple[int, ...]], batch: int, for_latency: bool, by_speed: bool
    ) -> tuple[list[int], list[tuple[float, ...]]] | None:
        target, num_layers = self._target, self._target.model.shape.num_layers
        work = target.workload.mean_step(batch, 1 if for_latency else len(groups), target.limits)
        shares = [self._shares_of(ranks, work) if by_speed else (1.0,) * len(ranks) for ranks in groups]
        costs, missing = [], 0.0
        before: tuple[int, ...] = ()
        tokens = target.wanted_tokens(batch)
        for place, (ranks, share) in enumerate(zip(groups, shares, strict=True)):
            fixed_s, layer_s, held = self._stage(ranks, share, before, work, place == 0, place == len(groups) - 1)
            costs.append(LayerCost(fixed_s, layer_s, min(rank.most_layers(tokens) for rank in held)))
            before = ranks
            missing = max(missing, sum(rank.layer + rank.layer_token * tokens for rank in held))
        counts = divide_layers(costs, num_layers, minimises_sum=for_latency)
        if counts is None and batch == 1:
            lacking = max(1, num_layers - sum(min(cost.most, num_layers) for cost in costs))
            self._miss(lacking * missing)
        return None if counts is None else (counts, shares)

    def _miss(self, num_bytes: float) -> None:
        if self.least_missing is None or num_bytes < self.least_missing:
            self.least_missing = num_bytes

    def _shares_of(self, ranks: tuple[int, ...], work: StepWork) -> tuple[float, ...]:
        """Equal for like ranks; else by speed alone, with the roundings that the cost model likes best."""
        kinds = tuple(self._kinds[rank] for rank in ranks)
        if len(set(kinds)) == 1:
            return (1.0,) * len(ranks)
        key = (kinds, work)
        if key not in self._shares:
            speeds = {kind: self._speed(rank, work) for kind, rank in zip(kinds, ranks, strict=True)}

            def seconds(shares: tuple[float, ...]) -> float:
                return self._cost(ranks, shares, (), _PROBE_LAYERS, False, False).terms(work).total

            self._shares[key] = choose_shares([speeds[kind] for kind in kinds], self._target.model.shape, seconds)
        return self._shares[key]

    def _speed(self, rank: int, work: StepWork) -> float:
        """Layers a second of a rank that holds whole layers alone."""
        low, high = (
            self._cost((rank,), (1.0,), (), count, False, False).terms(work).total for count in (1, _PROBE_LAYERS)
        )
        return (_PROBE_LAYERS - 1) / (high - low)

    def _stage(
        self,
        ranks: tuple[int, ...],
        shares: tuple[float, ...],
        before: tuple[int, ...],
        work: StepWork,
        is_first: bool,
        is_last: bool,
    ) -> tuple[float, float, list[_Held]]:
        """Seconds without a layer and of a layer, and the bytes of each rank: straight lines through two counts."""
        cluster = self._target.cluster
        kinds = tuple(self._kinds[rank] for rank in ranks)
        links = frozenset(cluster.link(before[j % len(before)], rank) for j, rank in enumerate(ranks) if before)
        num_nodes = len({cluster.ranks[rank].node for rank in ranks})
        key = (kinds, shares, num_nodes, links, work, is_first, is_last)
        found = self._stages.get(key)
        if found is None:
            one, many = (self._cost(ranks, shares, before, n, is_first, is_last) for n in (1, _PROBE_LAYERS))
            step = _PROBE_LAYERS - 1
            one_s, many_s = one.terms(work).total, many.terms(work).total
            layer_s = (many_s - one_s) / step
            held = []
            for index, rank in enumerate(ranks):
                layer = (many.held_bytes[index] - one.held_bytes[index]) / step
                usable = self._target.usable_bytes(rank)
                held.append(_Held(one.held_bytes[index] - layer, layer, one.kv_token_bytes[index], usable))
            found = self._stages[key] = one_s - layer_s, layer_s, held
        return found

    def _cost(
        self,
        ranks: tuple[int, ...],
        shares: tuple[float, ...],
        before: tuple[int, ...],
        layers: int,
        is_first: bool,
        is_last: bool,
    ) -> StageCost:
        spans = shard_axes(self._target.model.shape, shares)
        seats = [
            Seat(rank, 0, 0, index, range(layers), spans[index], is_first, is_last) for index, rank in enumerate(ranks)
        ]
        return StageCost(self._target.model, seats, self._target.cluster, before)
