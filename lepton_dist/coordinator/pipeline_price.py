"""What a request costs a pipeline that stays full: a stretch of its life, simulated. Pure.

In a pipeline a batch that holds a prompt holds up those behind it, and how much depends on what follows it: requests
of one length that began together stay together, and their prompts hold up little. No sum of costs tells that, so the
real scheduler is asked.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.simulator import Simulator
from lepton_dist.coordinator.workload import Workload
from lepton_dist.plan.plan import EngineLimits, Plan, Replica

_TOKENS = 16_000  # that are simulated, about, where one generation of requests is not more


def pipeline_request_s(
    replica: Replica, limits: EngineLimits, costs: CostModel, workload: Workload, batch: int
) -> float:
    """Seconds of a replica's time that a request takes in the mean, `batch` of them at a time.

    `costs` are those of the resolved `replica` alone. A few whole generations run, from their beginning to their end.
    """
    typical = list(workload.typical)
    generations = max(2, min(5, int(_TOKENS / workload.output_tokens / batch)))
    count = -(-generations * batch // len(typical)) * len(typical)  # each of them as often
    requests = list(islice(cycle(typical), count))
    blocks = (batch + 1) * -(-workload.longest_tokens // limits.block_tokens)
    plan = Plan(replicas=(replica,), engine=replace(limits, max_sequences=batch))
    return Simulator(plan, costs, [blocks]).run(requests).makespan_s / count
