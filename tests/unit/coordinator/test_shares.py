"""Uneven shares: two ranks of one node, one measured at half the other's speed, in a cluster file."""

from __future__ import annotations

import yaml

from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cluster_document import parse_cluster
from lepton_dist.coordinator.planner import rank_plans
from lepton_dist.coordinator.pricing import Priced, Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.engine.work import StepWork, chunk_pairs
from lepton_dist.plan.plan import Plan, Replica, Stage
from tests.unit.coordinator.test_oracles import BF16
from tests.unit.coordinator.test_planner import SHAPE

PREFILL = StepWork(512, 1, 1, 0, chunk_pairs(0, 512))


def kind(speed: float) -> dict[str, object]:
    """One core of a small server, as `profile` writes it; a slow one takes as much longer for everything."""
    rates = {"memory_bytes_per_s": 1.3e10, "attention_bytes_per_s": 2.8e9, "attention_flops_per_s": 2e10}
    seconds = {
        "step_s": 8e-4,
        "layer_s": 2e-4,
        "sequence_s": 1e-4,
        "kv_head_s": 3e-6,
        "element_s": 3e-9,
        "logit_s": 5e-9,
    }
    return {
        "device": "cpu",
        "threads": 1,
        "memory_bytes": 8 << 30,
        **{name: rate * speed for name, rate in rates.items()},
        **{name: value / speed for name, value in seconds.items()},
        "matmul_flops_per_s": {"bfloat16": {1: 1.1e10 * speed, 32: 7e10 * speed, 512: 7.2e10 * speed}},
    }


def half_speed() -> Cluster:
    document = {
        "name": "uneven",
        "kinds": {"fast": kind(1.0), "slow": kind(0.5)},
        "hosts": [
            {"host": "a", "node": 0, "kind": "fast", "ranks": "0"},
            {"host": "a", "node": 0, "kind": "slow", "ranks": "1"},
        ],
        "links": {
            "within_node": {"latency_s": 5e-5, "bytes_per_s": 7e9},
            "between_nodes": {"latency_s": 1e-3, "bytes_per_s": 1e8},
            "within_reduce": {"num_ranks": 2, "seconds": {2048: 9e-6, 131072: 4.7e-5, 1048576: 3.6e-4}},
        },
    }
    return parse_cluster(yaml.safe_dump(document))


def target(cluster: Cluster) -> Target:
    prompts = Workload.of([RequestLengths(512, 1, 1)], is_endless=True)
    return Target(cluster, ModelCost(SHAPE, BF16), 4096, prompts)


def one_group(plans: list[Priced]) -> Stage:
    """The stage of the best plan with both ranks in one group."""
    return next(p.plan.replicas[0].stages[0] for p in plans if len(p.plan.replicas[0].stages[0].ranks) == 2)


def test_uneven_shares_are_proposed_and_said_to_pay() -> None:
    wanted = target(half_speed())
    plans = rank_plans(wanted, "latency")
    stage = plans[0].plan.replicas[0].stages[0]
    assert stage == one_group(plans) and set(stage.ranks) == {0, 1}, "both ranks share each layer"
    shares = dict(zip(stage.ranks, stage.shares, strict=True))
    assert shares[0] >= 1.5 * shares[1]
    assert prefill_s(wanted, (1.0, 1.0)) / prefill_s(wanted, (shares[0], shares[1])) >= 1.25


def prefill_s(wanted: Target, shares: tuple[float, float]) -> float:
    replica = Replica((Stage((0, 1), 0, shares),))
    return wanted.costs(Plan(replicas=(replica,)).resolve(SHAPE, 2).replicas).replicas[0].step_s(PREFILL)
