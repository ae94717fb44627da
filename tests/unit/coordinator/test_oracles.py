"""The planner's parts, and the planner, against the best of everything that small instances allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.cluster import Cluster, Link, Matmul, RankProfile
from lepton_dist.coordinator.packing import Item, best_counts
from lepton_dist.coordinator.partition import LayerCost, choose_shares, divide_layers
from lepton_dist.coordinator.planner import rank_plans
from lepton_dist.coordinator.pricing import Target, fit_memory, request_s
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.plan.axes import Axis, ModelShape, shard_axes, span_size
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.plan.precision import Dtypes

BF16 = Dtypes("bfloat16", "bfloat16", "bfloat16", "bfloat16")
SHAPE = ModelShape(num_layers=4, hidden=512, num_heads=8, num_kv_heads=4, head_dim=64, ffn=2048, vocab=8192)

layer_costs = st.builds(LayerCost, st.integers(0, 20).map(float), st.integers(1, 9).map(float), st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(st.lists(layer_costs, min_size=1, max_size=4), st.integers(1, 9), st.booleans())
def test_layers_are_divided_as_well_as_can_be(stages: list[LayerCost], num_layers: int, minimises_sum: bool) -> None:
    fold = sum if minimises_sum else max
    best = min(
        (
            fold(stage.seconds(count) for stage, count in zip(stages, counts, strict=True))
            for counts in product(range(1, num_layers + 1), repeat=len(stages))
            if sum(counts) == num_layers and all(c <= s.most for c, s in zip(counts, stages, strict=True))
        ),
        default=None,
    )
    counts = divide_layers(stages, num_layers, minimises_sum=minimises_sum)
    if best is None:
        assert counts is None
        return
    assert counts is not None and sum(counts) == num_layers
    assert all(1 <= count <= stage.most for count, stage in zip(counts, stages, strict=True))
    assert fold(stage.seconds(count) for stage, count in zip(stages, counts, strict=True)) == best


items = st.builds(Item, st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(1, 20).map(float))


@settings(max_examples=150, deadline=None)
@given(st.tuples(st.integers(0, 8), st.integers(0, 8)), st.lists(items, min_size=1, max_size=4))
def test_replicas_are_packed_as_well_as_can_be(capacity: tuple[int, int], choices: list[Item]) -> None:
    choices = [item for item in choices if any(item.use)]

    def best(left: tuple[int, int], index: int) -> float:
        if index == len(choices):
            return 0.0
        item, found, count = choices[index], 0.0, 0
        while all(count * use <= have for use, have in zip(item.use, left, strict=True)):
            rest = (left[0] - count * item.use[0], left[1] - count * item.use[1])
            found = max(found, count * item.value + best(rest, index + 1))
            count += 1
        return found

    counts = best_counts(capacity, choices)
    for axis in range(2):
        assert sum(count * item.use[axis] for count, item in zip(counts, choices, strict=True)) <= capacity[axis]
    assert sum(count * item.value for count, item in zip(counts, choices, strict=True)) == best(capacity, 0)


def test_a_coarse_grid_packs_nearly_everything() -> None:
    """Four kinds of 256 ranks are too many states for a rank each."""
    choices = [
        Item((1, 0, 0, 0), 1.0),
        Item((0, 3, 0, 0), 3.0),
        Item((0, 0, 2, 2), 4.4),
        Item((0, 0, 1, 0), 1.0),
        Item((0, 0, 0, 1), 1.0),
    ]
    counts = best_counts((256, 256, 256, 256), choices)
    assert sum(count * item.value for count, item in zip(counts, choices, strict=True)) >= 0.99 * (
        256 + 255 + 128 * 4.4
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.5, 8.0), min_size=2, max_size=3), st.floats(0.0, 0.3))
def test_shares_are_as_good_as_any_rounding_of_heads(speeds: list[float], per_rank_s: float) -> None:
    """The slowest rank's time, over all ways to deal the heads out; shares of the ffn follow those of the heads."""

    def seconds(shares: tuple[float, ...]) -> float:
        return max(
            (span_size(spans[Axis.HEADS]) / SHAPE.num_heads + span_size(spans[Axis.FFN]) / SHAPE.ffn) / speed
            + per_rank_s
            for spans, speed in zip(shard_axes(SHAPE, shares), speeds, strict=True)
        )

    every = [
        seconds(tuple(map(float, counts)))
        for counts in product(range(1, SHAPE.num_kv_heads + 1), repeat=len(speeds))
        if sum(counts) == SHAPE.num_kv_heads
    ]
    assert seconds(choose_shares(speeds, SHAPE, seconds)) <= min(every) * 1.0001


def machines(speeds: list[float], nodes: list[int]) -> Cluster:
    ranks = []
    for rank, (speed, node) in enumerate(zip(speeds, nodes, strict=True)):
        matmul = Matmul({"bfloat16": ((1, 1e10 * speed), (32, 1e11 * speed), (512, 2e11 * speed))})
        rates = (2e10 * speed, matmul, 1e10 * speed, 5e10 * speed, 2e-4 / speed, 5e-5 / speed, 3e-6 / speed)
        ranks.append(RankProfile(rank, f"n{node}", node, "cpu", 1, 8 << 30, *rates))
    return Cluster("small", tuple(ranks), Link(1e-6, 1e10), Link(3e-5, 1e9))


def every_replica(ranks: tuple[int, ...]) -> Iterator[Replica]:
    """All chains of groups over all of these ranks in this order, with all layers and equal shares."""
    if not ranks:
        return
    for cuts in product((False, True), repeat=len(ranks) - 1):
        groups: list[list[int]] = [[ranks[0]]]
        for rank, is_cut in zip(ranks[1:], cuts, strict=True):
            if is_cut:
                groups.append([rank])
            else:
                groups[-1].append(rank)
        if any(group != sorted(group) for group in groups):
            continue
        for layers in product(range(1, SHAPE.num_layers + 1), repeat=len(groups)):
            if sum(layers) == SHAPE.num_layers:
                yield Replica(tuple(Stage(tuple(g), n) for g, n in zip(groups, layers, strict=True)))


def every_plan(num_ranks: int) -> Iterator[tuple[Replica, ...]]:
    """All ways to make replicas of some of the ranks."""
    for owners in product(range(num_ranks + 1), repeat=num_ranks):
        # 0 is left out; replicas are numbered in the order of their first rank.
        used = [owner for owner in owners if owner]
        if used and list(dict.fromkeys(used)) == list(range(1, max(used) + 1)):
            teams = [tuple(r for r in range(num_ranks) if owners[r] == team) for team in range(1, max(used) + 1)]
            orders = [[item for order in permutations(team) for item in every_replica(order)] for team in teams]
            yield from product(*orders)


@pytest.mark.parametrize(
    ("speeds", "nodes", "memory"),
    [
        ([1.0, 1.0, 1.0], [0, 0, 1], 8 << 30),
        pytest.param([4.0, 1.0, 1.0], [0, 1, 1], 8 << 30, marks=pytest.mark.slow),
        pytest.param([1.0, 2.0, 8.0], [0, 1, 2], 8 << 30, marks=pytest.mark.slow),
        ([1.0, 2.0, 2.0], [0, 0, 0], 30 << 20),
        ([1.0, 1.0, 4.0], [0, 1, 2], 26 << 20),
    ],
)
def test_the_plan_is_within_a_few_percent_of_the_best_there_is(
    speeds: list[float], nodes: list[int], memory: int
) -> None:
    cluster = machines(speeds, nodes)
    cluster = replace(cluster, ranks=tuple(replace(rank, memory_bytes=memory) for rank in cluster.ranks))
    workload = Workload.of([RequestLengths(100, 50, 50)], is_endless=True)
    target = Target(cluster, ModelCost(SHAPE, BF16), 2048, workload)
    best = 0.0
    known: dict[tuple[Replica, int], float] = {}
    for replicas in every_plan(len(speeds)):
        resolved = Plan(replicas=replicas).resolve(SHAPE, len(speeds)).replicas
        costs = target.costs(resolved)
        fit = fit_memory(target, resolved, costs.replicas)
        if fit is None:
            continue
        rate = 0.0
        for item, capacity in zip(resolved, fit.capacity_tokens, strict=True):
            batch = workload.batch(target.limits, capacity, len(resolved))
            if (item, batch) not in known:
                known[item, batch] = request_s(target, item, target.costs((item,)), batch)
            rate += 1 / known[item, batch]
        best = max(best, rate * workload.output_tokens)
    assert best > 0
    found = max(plan.tokens_per_s for plan in rank_plans(target))
    assert found >= 0.95 * best
