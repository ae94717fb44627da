"""From what ranks measured to a cluster: noise is taken out, what differs stays, and every rate is there."""

from __future__ import annotations

import msgspec
import pytest

from lepton_dist.bench.profile import summary
from lepton_dist.comm.world import World, run_local
from lepton_dist.coordinator.cluster import Link
from lepton_dist.runtime import compute
from lepton_dist.runtime.facts import ComputeFacts, PairTiming, RankFacts, ReduceCurve
from lepton_dist.runtime.profiling import make_cluster

COMPUTE = ComputeFacts(
    memory_bytes_per_s=1e10,
    matmul={"bfloat16": [(1, 9e9), (512, 1e11)], "int4": [(1, 4e10), (512, 8e10)]},
    attention_bytes_per_s=2e9,
    attention_flops_per_s=1e10,
    step_s=1e-4,
    layer_s=5e-5,
    sequence_s=1e-5,
    kv_head_s=2e-6,
    element_s=1e-9,
    logit_s=1e-9,
)


def times(speed: float) -> ComputeFacts:
    return ComputeFacts(
        **{
            **msgspec.structs.asdict(COMPUTE),
            "memory_bytes_per_s": speed * COMPUTE.memory_bytes_per_s,
            "matmul": {kind: [(w, speed * rate) for w, rate in curve] for kind, curve in COMPUTE.matmul.items()},
        }
    )


def fact(rank: int, speed: float = 1.0, threads: int = 4, memory: int = 8 << 30) -> RankFacts:
    return RankFacts(rank, {}, [0], 4, 0, threads, memory, 4 * memory, 0, 0, compute=times(speed))


def test_noise_is_taken_out_and_slow_hosts_stay_slow() -> None:
    speeds = [1.02, 0.97, 1.0, 1.03, 0.6, 0.61]
    nodes = [rank // 2 for rank in range(6)]
    facts = [fact(rank, speed, memory=(8 << 30) - rank) for rank, speed in enumerate(speeds)]
    cluster = make_cluster("c", [f"n{node}" for node in nodes], nodes, facts)
    assert len({profile.kind for profile in cluster.ranks}) == 2
    assert len({profile.kind for profile in cluster.ranks[:4]}) == 1
    assert cluster.ranks[0].matmul.rates["bfloat16"] == ((1, 9.09e9), (512, 1.01e11))
    assert cluster.ranks[0].memory_bytes == (8 << 30) - 3
    assert [profile.rank for profile in cluster.ranks] == list(range(6))
    slow = cluster.slow_hosts()
    assert {host.host for host in slow} == {"n2"}
    text = summary(cluster, slow)
    assert "4 rank(s) on 2 node(s): 4 thread(s), 8.0 GiB" in text
    assert "warning: n2 is 40 % slower than its twins: memory bytes/s" in text


def test_memory_is_as_fast_as_weights_are_read() -> None:
    """int4 streams 0.28 bytes a flop: 40 GFLOP/s at width 1 are 11.25 GB/s, more than the sweep read."""
    cluster = make_cluster("c", ["a"], [0], [fact(0)])
    assert cluster.ranks[0].memory_bytes_per_s == pytest.approx(1.125e10, rel=1e-3)


def test_other_machines_are_other_kinds() -> None:
    cluster = make_cluster("c", ["a", "b", "c"], [0, 1, 2], [fact(0), fact(1, threads=8), fact(2, memory=64 << 30)])
    assert len({profile.kind for profile in cluster.ranks}) == 3
    assert cluster.slow_hosts() == []


def test_links_by_class_and_those_that_differ() -> None:
    nodes = [0, 0, 1, 1, 2, 2, 3, 3]
    inside = [PairTiming(first, first + 1, 1e-6, 1e10) for first in (0, 2, 4, 6)]
    between = [PairTiming(0, 2, 3e-5, 1e9), PairTiming(2, 4, 3.1e-5, 1e9), PairTiming(4, 6, 3e-5, 2e8)]
    curve = ReduceCurve("node", 2, [(1024, 1e-5), (4096, 2e-5)])
    slower = ReduceCurve("node", 2, [(1024, 3e-5), (4096, 6e-5)])
    job = ReduceCurve("job", 8, [(1024, 1e-4)])
    facts = [fact(rank) for rank in range(8)]
    facts[0] = msgspec.structs.replace(facts[0], pairs=inside + between, reduces=[curve, job])
    facts[2] = msgspec.structs.replace(facts[2], reduces=[slower])
    facts[4] = msgspec.structs.replace(facts[4], reduces=[slower])
    cluster = make_cluster("c", [f"n{node}" for node in nodes], nodes, facts)
    assert cluster.link(0, 1) == Link(1e-6, 1e10)
    assert cluster.link(0, 7) == Link(3e-5, 1e9)
    assert cluster.link(5, 6) == Link(3e-5, 2e8) and set(cluster.pairs) == {(2, 3)}
    assert cluster.all_reduce_s([0, 1], 1024) == 3e-5
    assert cluster.all_reduce_s(range(8), 1024) == 1e-4
    text = summary(cluster, [])
    assert "inside nodes: 1.0 us, 10.00 GB/s" in text and "1 pair(s) of nodes differ" in text
    # A job of one rank has no links: what stands for them makes them dear, and nothing is measured.
    alone = make_cluster("c", ["a"], [0], [fact(0)])
    assert alone.within_reduce is None and "nodes:" not in summary(alone, [])
    assert alone.within_node == alone.between_nodes


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_NODE_BYTES", "_LEAST_BYTES", "_CACHED_BYTES", "_LEAST_CACHED_BYTES"):
        monkeypatch.setattr(compute, name, 32 << 20)
    monkeypatch.setattr(compute, "_SECONDS_AN_ITEM", 0.004)


@pytest.mark.usefixtures("quick")
def test_ranks_measure_everything_together() -> None:
    def measure(world: World) -> tuple[ComputeFacts, ReduceCurve]:
        node = world.group(range(world.size), "node")
        return compute.measure_compute(node, world.group([world.rank], "alone")), compute.measure_reduce(node, "node")

    results = run_local(2, measure)
    for facts, curve in results:
        assert set(facts.matmul) == {"bfloat16", "float32", "int8", "int4"}
        for points in facts.matmul.values():
            assert [width for width, _ in points] == [1, 8, 32, 128, 512]
            assert all(1e7 < rate < 1e14 for _, rate in points)
        assert 1e8 < facts.memory_bytes_per_s < 1e13
        assert facts.attention_bytes_per_s > 1e6 and facts.attention_flops_per_s > 1e7
        for name in ("step_s", "layer_s", "sequence_s", "kv_head_s"):
            assert 0 <= getattr(facts, name) < 0.1, name
        assert 0 <= facts.element_s < 1e-5 and 0 <= facts.logit_s < 1e-5
        assert curve.num_ranks == 2 and len(curve.seconds) == len(compute.REDUCE_BYTES)
    # The slowest rank's seconds, so that all say the same.
    assert results[0][1] == results[1][1]
