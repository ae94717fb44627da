"""The planner prefers what the prices say, keeps to memory, and is quick on large clusters."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.cluster import Cluster, Link
from lepton_dist.coordinator.planner import DoesNotFitError, rank_plans
from lepton_dist.coordinator.pricing import MEMORY_MARGIN, Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.errors import ConfigError
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.document import parse_plan, plan_to_yaml
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes
from tests.unit.coordinator.test_oracles import BF16, machines

SHAPE = ModelShape(num_layers=12, hidden=768, num_heads=12, num_kv_heads=4, head_dim=64, ffn=3072, vocab=32000)
LARGE = ModelShape(num_layers=32, hidden=4096, num_heads=32, num_kv_heads=8, head_dim=128, ffn=14336, vocab=128256)
STREAM = Workload.of([RequestLengths(100, 50, 50)], is_endless=True)


def target(cluster: Cluster, shape: ModelShape = SHAPE, workload: Workload = STREAM, dtypes: Dtypes = BF16) -> Target:
    return Target(cluster, ModelCost(shape, dtypes), 4096, workload)


def with_memory(cluster: Cluster, *sizes: int) -> Cluster:
    ranks = (replace(r, memory_bytes=sizes[r.rank % len(sizes)]) for r in cluster.ranks)
    return replace(cluster, ranks=tuple(ranks))


def best(cluster: Cluster, shape: ModelShape = SHAPE, workload: Workload = STREAM, **more) -> Plan:
    return rank_plans(target(cluster, shape, workload), **more)[0].plan


def test_a_small_model_is_copied() -> None:
    plan = best(machines([1.0] * 4, [0, 0, 1, 1]))
    assert [len(replica.ranks) for replica in plan.replicas] == [1, 1, 1, 1]


def test_a_large_model_is_shared_where_links_are_fast_and_cut_where_they_are_slow() -> None:
    """The same ranks on one node and on four, with memory for no whole copy: only the links differ."""
    size = 7 << 30
    fast = replace(machines([1.0] * 4, [0] * 4), within_node=Link(1e-7, 1e12))
    slow = replace(machines([1.0] * 4, [0, 1, 2, 3]), between_nodes=Link(0.1, 1e7))
    wide = best(with_memory(fast, size), LARGE, objective="latency").replicas[0]
    deep = best(with_memory(slow, size), LARGE, objective="latency").replicas[0]
    assert len(wide.stages) == 1 and len(wide.stages[0].ranks) == 4
    assert all(len(stage.ranks) == 1 for stage in deep.stages) and len(deep.stages) >= 3


def test_a_fast_stage_gets_more_layers() -> None:
    cluster = replace(machines([1.0, 3.0], [0, 1]), between_nodes=Link(1e-2, 1e8))
    plan = best(with_memory(cluster, 330 << 20))
    stages = {stage.ranks: stage.layers for stage in plan.replicas[0].stages}
    assert stages[1,] > stages[0,]


def test_unlike_ranks_of_a_node_get_uneven_shares() -> None:
    cluster = replace(machines([1.0, 3.0], [0, 0]), within_node=Link(1e-8, 1e13))
    plan = best(cluster, objective="latency")
    assert [len(replica.stages) for replica in plan.replicas] == [1]
    shares = dict(zip(plan.replicas[0].stages[0].ranks, plan.replicas[0].stages[0].shares, strict=True))
    assert shares[1] > 1.5 * shares[0]


def test_a_weak_rank_is_left_out_when_it_would_not_pay() -> None:
    plan = best(machines([1.0, 1.0, 0.001], [0, 1, 2]), objective="latency")
    assert 2 not in plan.ranks


def test_a_small_workload_is_simulated_and_dealt_out() -> None:
    workload = Workload.of([RequestLengths(100, 50, 50)] * 40)
    plans = rank_plans(target(machines([1.0, 1.0, 2.0], [0, 1, 2]), workload=workload))
    assert all(plan.is_simulated for plan in plans)
    assert plans[0].seconds is not None
    assert plans[0].seconds * plans[0].tokens_per_s == pytest.approx(40 * 50)
    assert plans[0].tokens_per_s * 1.02 >= max(plan.tokens_per_s for plan in plans)


def test_the_plan_is_one_that_can_be_loaded() -> None:
    plan = best(machines([1.0, 3.0], [0, 0]))
    assert parse_plan(plan_to_yaml(plan)).resolve(SHAPE, 2) == plan


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0]), st.integers(0, 2)), min_size=1, max_size=5), st.data())
def test_no_plan_breaks_the_memory_of_a_rank(parts: list[tuple[float, int]], data: st.DataObject) -> None:
    cluster = machines([speed for speed, _ in parts], [node for _, node in parts])
    sizes = data.draw(st.lists(st.integers(20, 800), min_size=len(parts), max_size=len(parts)))
    cluster = with_memory(cluster, *(size << 20 for size in sizes))
    wanted = target(cluster)
    try:
        plans = rank_plans(wanted)
    except DoesNotFitError:
        return
    for priced in plans:
        costs = wanted.costs(priced.plan.replicas)
        assert priced.plan.resolve(SHAPE, len(parts)) == priced.plan
        for index, (replica, cost) in enumerate(zip(priced.plan.replicas, costs.replicas, strict=True)):
            assert priced.fit.capacity_tokens[index] >= wanted.workload.longest_tokens
            for stage, stage_cost in zip(replica.stages, cost.stages, strict=True):
                for rank, held, token in zip(
                    stage.ranks, stage_cost.held_bytes, stage_cost.kv_token_bytes, strict=True
                ):
                    # As the runtime takes it, before it levels the ranks of a replica.
                    size = token * 16
                    blocks = min(int(priced.plan.engine.kv_cache_bytes // size), wanted.most_blocks)
                    assert held + blocks * size <= (1 - MEMORY_MARGIN) * cluster.ranks[rank].memory_bytes + 1
                    assert priced.fit.rank_bytes[rank] <= held + blocks * size + 1


def test_what_does_not_fit_says_what_is_missing_and_what_would_help() -> None:
    cluster = with_memory(machines([1.0, 1.0], [0, 1]), 6 << 30)
    with pytest.raises(DoesNotFitError) as error:
        rank_plans(target(cluster, LARGE))
    text = str(error.value)
    assert "bytes are missing" in text and "more rank(s)" in text and "--weights int8" in text
    missing = int(text.split(" bytes are missing")[0].split()[-1])
    # With what is missing, and a little for what cannot be cut finely, it fits.
    more = int((missing / 2 + (1 << 30)) / (1 - MEMORY_MARGIN))
    assert rank_plans(target(with_memory(cluster, (6 << 30) + more), LARGE))
    with pytest.raises(DoesNotFitError):
        rank_plans(target(with_memory(cluster, (6 << 30) + missing // 4), LARGE))


def test_an_empty_workload_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        Workload.of([])


# How long it takes is held to only where it is asked for: a shared machine can be half as fast for minutes.
@pytest.mark.parametrize(
    ("nodes", "per_node", "limit_s"),
    [
        (16, 4, math.inf),
        pytest.param(16, 4, 10.0, marks=pytest.mark.slow),
        pytest.param(64, 16, 60.0, marks=pytest.mark.slow),
    ],
)
def test_large_clusters_of_four_kinds_are_planned(nodes: int, per_node: int, limit_s: float) -> None:
    speeds = [(1.0, 2.0, 5.0, 9.0)[node * 4 // nodes] for node in range(nodes) for _ in range(per_node)]
    cluster = machines(speeds, [node for node in range(nodes) for _ in range(per_node)])
    start_s = time.perf_counter()
    plans = rank_plans(target(cluster, LARGE, Workload.of([RequestLengths(100, 100, 100)] * 400)))
    assert time.perf_counter() - start_s < limit_s
    assert all(plan.is_simulated for plan in plans) and len(plans) >= 4
    # Two thirds of the speed is in the half of the ranks that is fastest: no good plan leaves those out.
    assert set(range(nodes * per_node // 2, nodes * per_node)) <= plans[0].plan.ranks
