"""From a cluster, a model and a workload to the best plan: candidates, each priced by the cost model. Pure.

Nothing here prefers a node to a network, or one kind of parallelism to another: links and rates are in the prices.
How candidates are found, and what is left out, is in docs/decisions/007-planner.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lepton_dist.coordinator.builder import Builder, Built
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.likeness import Likeness, kind_numbers
from lepton_dist.coordinator.packing import Item, best_counts
from lepton_dist.coordinator.pools import Pool, Seating, as_replica, layouts
from lepton_dist.coordinator.pricing import (
    MEMORY_MARGIN,
    Priced,
    Target,
    fit_memory,
    request_s,
    rough_request_s,
    simulated,
)
from lepton_dist.coordinator.shapes import mixed_shapes, uniform_shapes
from lepton_dist.errors import UsageError
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.plan.precision import QUANTIZED

Objective = Literal["throughput", "latency"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
_PRICED = 16  # candidates that get a full price, of those that a sum of their replicas' prices favours
_SIMULATED = 8  # and of those, the simulator's word for a short workload
_MORE_THAN_NOISE = 1.02  # a plan that uses more ranks must be this much better to be preferred


class DoesNotFitError(UsageError):
    """No plan holds the model: says by how many bytes, and what would make it fit."""


@dataclass(frozen=True)
class _Candidate:
    """How many replicas of which shape, and what they are worth together by the prices of their shapes."""

    pools: tuple[Pool, ...]
    parts: tuple[tuple[Built, int], ...]
    worth: float


def rank_plans(target: Target, objective: Objective = "throughput") -> list[Priced]:
    """Plans from the best on, all within memory, priced for the workload.

    Raises:
        DoesNotFitError: none is within memory.
    """
    kinds = kind_numbers(target.cluster)
    candidates: list[_Candidate] = []
    missing: list[float] = []
    for pools in layouts(target.cluster, kinds):
        builder = Builder(target, pools, kinds)
        built = _built(builder, pools, target, objective)
        candidates += _fastest(pools, built) if objective == "latency" else _fullest(pools, built)
        if builder.least_missing is not None:
            missing.append(builder.least_missing)
    candidates.sort(key=lambda candidate: -candidate.worth)
    pricer = _Pricer(target, kinds)
    priced: dict[object, Priced] = {}
    for candidate in candidates:
        if len(priced) == _PRICED:
            break
        found = pricer.price(_replicas(candidate, target))
        if found is not None:
            # Plans of one price are permutations of each other.
            priced.setdefault((found.num_ranks, f"{found.tokens_per_s:.6g} {found.latency_s:.6g}"), found)
    if not priced:
        raise DoesNotFitError(_what_is_missing(target, min(missing, default=1.0)))
    return _ordered(target, list(priced.values()), objective)


def _ordered(target: Target, priced: list[Priced], objective: Objective) -> list[Priced]:
    """The best first; for throughput the first few, as the simulator sees them."""
    if objective == "latency":
        near_s = min(plan.latency_s for plan in priced) * _MORE_THAN_NOISE
        # Copies of the fastest replica cost no latency: of equals, the plan that does more.
        return sorted(priced, key=lambda plan: (max(plan.latency_s, near_s), -plan.tokens_per_s))
    first = sorted((simulated(target, plan) for plan in sorted(priced, key=_merit)[:_SIMULATED]), key=_merit)
    # A tie goes to the plan that keeps fewer ranks busy.
    ties = [plan for plan in first if plan.tokens_per_s * _MORE_THAN_NOISE >= first[0].tokens_per_s]
    chosen = min(ties, key=lambda plan: (plan.num_ranks, _merit(plan)))
    return [chosen, *(plan for plan in first if plan is not chosen)]


def _merit(plan: Priced) -> float:
    return -plan.tokens_per_s


def _batches(target: Target) -> list[int]:
    """Sequences that a replica may have to itself: as many as it takes, or its part of a small workload."""
    most = target.limits.max_sequences
    if target.workload.is_endless:
        return [most]
    count, ranks = len(target.workload.requests), len(target.cluster.ranks)
    return sorted({max(1, min(most, -(-count // parts))) for parts in (1, ranks // 4 or 1, ranks)}, reverse=True)


def _built(builder: Builder, pools: tuple[Pool, ...], target: Target, objective: Objective) -> list[Built]:
    shape, batches = target.model.shape, _batches(target)
    widest = min(shape.num_heads, shape.ffn, shape.vocab)
    shapes = [*uniform_shapes(pools, shape.num_layers, widest), *mixed_shapes(pools, shape.num_layers, widest)]
    found = (builder.build(item, batches, for_latency=objective == "latency") for item in shapes)
    return [built for built in found if built is not None]


def _fastest(pools: tuple[Pool, ...], built: list[Built]) -> Iterator[_Candidate]:
    """Of each shape as many copies as fit."""
    room = [pool.size for pool in pools]
    for item in built:
        copies = min(have // use for have, use in zip(room, item.use, strict=True) if use)
        yield _Candidate(pools, ((item, copies),), 1 / item.latency_s)


def _fullest(pools: tuple[Pool, ...], built: list[Built]) -> Iterator[_Candidate]:
    """Of all shapes the best mix; and, to compare, each width and depth by itself in all pools and in each."""
    if not built:
        return
    room = [pool.size for pool in pools]
    for batch in built[0].batch_s:
        items = [Item(item.use, 1 / item.batch_s[batch]) for item in built]
        yield _candidate(pools, built, best_counts(room, items), batch)
    smallest = min(built[0].batch_s)
    meshes: dict[tuple[int, int], list[Built]] = {}
    for item in built:
        copies = min(have // use for have, use in zip(room, item.use, strict=True) if use)
        for batch in {smallest, max(item.batch_s)}:
            yield _candidate(pools, [item], [copies], batch)
            yield _candidate(pools, [item], [1], batch)
        if len(item.shape) == 1:
            meshes.setdefault((item.shape[0].width, item.shape[0].count), []).append(item)
    for alike in meshes.values():
        counts = [room[item.shape[0].pool] // item.use[item.shape[0].pool] for item in alike]
        yield _candidate(pools, alike, counts, smallest)


def _candidate(pools: tuple[Pool, ...], built: Sequence[Built], counts: Sequence[int], batch: int) -> _Candidate:
    parts = tuple((item, count) for item, count in zip(built, counts, strict=True) if count)
    return _Candidate(pools, parts, sum(count / item.batch_s[batch] for item, count in parts))


def _replicas(candidate: _Candidate, target: Target) -> tuple[Replica, ...]:
    """Ranks for every replica, wide groups first so that narrow ones fill what is left; by their first rank."""
    seating = Seating(candidate.pools)
    wide_first = sorted(candidate.parts, key=lambda part: -max(segment.width for segment in part[0].shape))
    found = []
    for built, count in wide_first:
        for _ in range(count):
            groups = seating.seat(built.shape)
            if groups is not None:
                found.append(as_replica(groups, built.layers, built.shares))
    found.sort(key=lambda item: item.leader)
    return Plan(replicas=tuple(found)).resolve(target.model.shape, len(target.cluster.ranks)).replicas


class _Pricer:
    """Prices whole plans; replicas that are alike are priced once."""

    def __init__(self, target: Target, kinds: Sequence[int]) -> None:
        self._target, self._alike = target, Likeness(target.cluster, kinds)
        self._costs: dict[object, CostModel] = {}
        self._seconds: dict[tuple[object, int], float] = {}

    def price(self, replicas: tuple[Replica, ...]) -> Priced | None:
        """None when the plan does not fit memory."""
        if not replicas:
            return None
        target, keys = self._target, [self._alike.of(item) for item in replicas]
        costs = [self._of(key, item) for key, item in zip(keys, replicas, strict=True)]
        fit = fit_memory(target, replicas, [cost.replicas[0] for cost in costs])
        if fit is None:
            return None
        per_s, latency_s = 0.0, 0.0
        for item, key, cost, capacity in zip(replicas, keys, costs, fit.capacity_tokens, strict=True):
            batch = target.workload.batch(target.limits, capacity, len(replicas))
            per_s += 1 / self._request_s(item, key, cost, batch)
            latency_s = max(latency_s, self._request_s(item, key, cost, 1))
        plan = Plan(replicas=replicas, engine=replace(target.limits, kv_cache_bytes=fit.kv_cache_bytes))
        seconds = None if target.workload.is_endless else len(target.workload.requests) / per_s
        return Priced(plan, fit, per_s * target.workload.output_tokens, latency_s, seconds)

    def _request_s(self, item: Replica, key: object, costs: CostModel, batch: int) -> float:
        if (key, batch) not in self._seconds:
            # What is simulated in the end needs no more than its place among the others.
            rough = self._target.is_short
            self._seconds[key, batch] = (
                rough_request_s(self._target, costs, batch) if rough else request_s(self._target, item, costs, batch)
            )
        return self._seconds[key, batch]

    def _of(self, key: object, item: Replica) -> CostModel:
        if key not in self._costs:
            self._costs[key] = self._target.costs((item,))
        return self._costs[key]


def _what_is_missing(target: Target, missing: float) -> str:
    """How far the nearest plan is from fitting, and what would help."""
    cluster, workload = target.cluster, target.workload
    whole = _whole_bytes(target)
    have = sum(target.usable_bytes(profile.rank) for profile in cluster.ranks)
    missing = max(missing, whole - have)
    usual = max(target.usable_bytes(profile.rank) for profile in cluster.ranks)
    help_with = [f"{max(1, -(-int(missing) // max(usual, 1)))} more rank(s) with {usual} usable bytes each"]
    smaller = [name for name in QUANTIZED if name != target.model.dtypes.weights]
    for name in smaller if target.model.dtypes.weights not in QUANTIZED else smaller[-1:]:
        rounded = replace(target.model, dtypes=replace(target.model.dtypes, weights=name))
        size = _whole_bytes(replace(target, model=rounded))
        if whole - size >= missing:
            help_with.append(f"--weights {name} ({size} bytes in all)")
            break
    return (
        f"the model fits on no plan of {cluster.name!r}: {int(missing)} bytes are missing. Weights and the KV cache of "
        f"one request of {workload.longest_tokens} tokens take {whole} bytes; {len(cluster.ranks)} rank(s) have "
        f"{have}, a margin of {MEMORY_MARGIN:.0%} kept free. It would fit with {', or with '.join(help_with)}"
    )


def _whole_bytes(target: Target) -> int:
    """Weights and the longest request's keys and values, undivided."""
    shape: ModelShape = target.model.shape
    single = (Replica((Stage((0,), shape.num_layers, (1.0,)),)),)
    stage = target.costs(single).replicas[0].stages[0]
    return int(stage.held_bytes[0] + target.wanted_tokens(1) * stage.kv_token_bytes[0])
