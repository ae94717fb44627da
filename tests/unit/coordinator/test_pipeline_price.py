"""The price of a request in a pipeline, against the simulator over a whole workload."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lepton_dist.bench.workload import offline_lengths
from lepton_dist.coordinator.cluster import Link
from lepton_dist.coordinator.pricing import Target, request_s, rough_request_s
from lepton_dist.coordinator.simulator import Simulator
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.plan.plan import EngineLimits, Plan, Replica, Stage
from tests.unit.coordinator.test_oracles import BF16, machines
from tests.unit.coordinator.test_planner import SHAPE

WORKLOADS = {
    "even": [RequestLengths(100, 50, 50)] * 400,
    "prompts": [RequestLengths(512, 16, 16)] * 200,
    "long prompts": [RequestLengths(2000, 100, 100)] * 60,
    "outputs": [RequestLengths(20, 200, 200)] * 200,
    "mixed": [RequestLengths(item.prompt, item.output, item.output) for item in offline_lengths(400, 3)],
}


@pytest.mark.parametrize("batch", [4, 32])
@pytest.mark.parametrize("stages", [1, 2, 6])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_request_costs_what_the_simulator_says(name: str, stages: int, batch: int) -> None:
    """A full replica's price by request, times the requests, is the makespan, but for its end."""
    requests = WORKLOADS[name]
    cluster = replace(machines([1.0] * stages, list(range(stages))), between_nodes=Link(5e-5, 1e9))
    limits = EngineLimits(max_sequences=batch)
    target = Target(cluster, ModelCost(SHAPE, BF16), 4096, Workload.of(requests, is_endless=True), limits)
    replica = Replica(tuple(Stage((rank,)) for rank in range(stages)))
    plan = Plan(replicas=(replica,), engine=limits).resolve(SHAPE, stages)
    costs = target.costs(plan.replicas)
    seconds = Simulator(plan, costs, [100_000]).run(requests).makespan_s
    assert len(requests) * request_s(target, plan.replicas[0], costs, batch) == pytest.approx(seconds, rel=0.2)
    # What shapes of replicas are compared by is no more than of the right size.
    assert 0.35 < len(requests) * rough_request_s(target, costs, batch) / seconds < 2.0
