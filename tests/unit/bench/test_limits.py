"""The limits that `bench` puts beside its figures, on machines whose rates are round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lepton_dist.bench.limits import PlanLimits, limits_table
from lepton_dist.bench.workload import Lengths
from lepton_dist.coordinator.cluster import AllReduce, Cluster, Link, Matmul
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.plan.precision import Dtypes
from tests.unit.coordinator.test_cluster import PROFILE

LAYER_WEIGHTS, HEAD_WEIGHTS = 4 * 128 * (2 * (8 + 2) * 16 + 3 * 512), 1000 * 128
LAST_WEIGHTS = 128 * (8 * 16 + 3 * 512)  # the output and the MLP of one layer
TOKEN_BYTES = 2 * 4 * 2 * 16 * 2


def cluster(num_ranks: int) -> Cluster:
    rates = {"bfloat16": ((1, 1e9), (512, 8e9)), "int8": ((1, 2e9), (512, 16e9))}
    rank = replace(PROFILE, memory_bytes_per_s=1e9, matmul=Matmul(rates))
    link = Link(1e-6, 1e9)
    reduce = AllReduce(num_ranks, ((2048, 4e-6), (16384, 9e-6)))
    ranks = tuple(replace(rank, rank=index) for index in range(num_ranks))
    return Cluster("test", ranks, link, link, {}, reduce if num_ranks > 1 else None, None)


SHAPE = ModelShape(4, 128, 8, 2, 16, 512, 1000)
ONE, WIDE = Replica((Stage((0,), layers=4),)), Replica((Stage((0, 1), layers=4),))
LONG = Replica((Stage((0,), layers=2), Stage((1,), layers=2)))
TWO = (ONE, Replica((Stage((1,), layers=4),)))


def limits(*replicas: Replica, weights: str = "bfloat16") -> PlanLimits:
    num_ranks = sum(len(replica.ranks) for replica in replicas)
    dtypes = Dtypes(weights, "bfloat16", "bfloat16", "bfloat16")
    return PlanLimits(cluster(num_ranks), Plan(replicas=replicas), ModelCost(SHAPE, dtypes))


def test_one_rank() -> None:
    one = limits(ONE)
    assert one.prefill() == pytest.approx(8e9 / (2 * (LAYER_WEIGHTS - LAST_WEIGHTS)))
    few = 2 * (LAYER_WEIGHTS + HEAD_WEIGHTS) + 40 * TOKEN_BYTES
    assert one.decode(1, 40) == pytest.approx(1e9 / few), "memory is the limit of few sequences"
    assert one.decode(1000, 0) == pytest.approx(8e9 / (2 * (LAYER_WEIGHTS + HEAD_WEIGHTS))), "and matmuls of many"
    operations = 2 * ((LAYER_WEIGHTS - LAST_WEIGHTS) * 30 + (LAST_WEIGHTS + HEAD_WEIGHTS) * 10)
    assert one.offline([Lengths(15, 5), Lengths(5, 5)]) == pytest.approx(10 * 8e9 / operations)


def test_ranks_that_share_a_layer_add_up_and_stages_take_turns() -> None:
    one, wide, long, two = limits(ONE), limits(WIDE), limits(LONG), limits(*TWO)
    assert wide.prefill() == pytest.approx(2 * one.prefill())
    assert long.prefill() == two.prefill() == pytest.approx(one.prefill()), "one prompt is in one place at a time"
    assert wide.decode(1, 0) == pytest.approx(2 * one.decode(1, 0))
    assert long.decode(1, 0) == two.decode(1, 0) == pytest.approx(one.decode(1, 0))
    items = [Lengths(15, 5)]
    assert wide.offline(items) == long.offline(items) == two.offline(items) == pytest.approx(2 * one.offline(items))


def test_quantised_weights_are_fewer_bytes_and_faster_products() -> None:
    plain, rounded = limits(ONE), limits(ONE, weights="int8")
    assert rounded.decode(1, 0) == pytest.approx(2 * plain.decode(1, 0))
    assert rounded.prefill() == pytest.approx(2 * plain.prefill())


def test_the_table_names_every_limit() -> None:
    text = limits_table(cluster(2))
    assert "limits of 2 rank(s) together" in text and "memory read 2.0 GB/s" in text
    assert "all-reduce of 2 ranks inside a node, us: 2 KiB 4, 16 KiB 9" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("int8"))
    assert (row[1], row[-1]) == ("4", "32")
    assert "all-reduce" not in limits_table(cluster(1))
