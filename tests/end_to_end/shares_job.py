"""A group of two ranks, one at half speed: tokens/s with equal shares and with the planner's.

``mpirun -n 2 python -m tests.end_to_end.shares_job MODEL REPEATS PROMPTS``. Rank 1 has a CPU quota of 5 ms in 10 ms
where control groups allow it, else a busy neighbour. The ranks are measured so, and the planner is asked for the best
group of both for prompts of 512 tokens. Rank 0 prints a JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys

from lepton_dist.bench.workload import Lengths, equal_lengths, make_requests
from lepton_dist.coordinator.planner import rank_plans
from lepton_dist.coordinator.pricing import Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.engine.work import StepWork, chunk_pairs
from lepton_dist.model.registry import read_model
from lepton_dist.plan.plan import Plan, Precision, Replica, Stage
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.profiling import make_cluster
from tests.end_to_end.measuring import ENGINE, pin, run_measurement, seconds_for
from tests.end_to_end.slowness import half_speed

_SLOW_RANK = 1
_PREFILL = StepWork(512, 1, 1, 0, chunk_pairs(0, 512))


def tokens_per_s(controller: Controller, model: str, plan: Plan, count: int) -> tuple[float, float]:
    """Of prefill, and of decoding eight sequences."""
    blueprint = open_model(controller, ModelRequest(model, plan, None, 1))
    vocab = blueprint.config.shape.vocab

    def seconds(lengths: list[Lengths], seed: int) -> float:
        return seconds_for(controller, make_requests(lengths, vocab, seed))

    seconds(equal_lengths(2, 512, 1), 1)
    prefill = 512 * count / seconds(equal_lengths(count, 512, 1), 2)
    decode = 8 * 24 / (seconds(equal_lengths(8, 32, 25), 3) - seconds(equal_lengths(8, 32, 1), 4))
    controller.close()
    return prefill, decode


def measure(controller: Controller, model: str, repeats: int, count: int) -> None:
    config, _ = read_model(model)
    dtypes = decide_dtypes(Precision(), None, config.dtype)
    world = controller.world
    facts = controller.examine(kinds=[dtypes.weights], threads=1)
    cluster = make_cluster("uneven", world.hosts, world.nodes, facts)
    prompts = Workload.of([RequestLengths(512, 1, 1)], is_endless=True)
    target = Target(cluster, ModelCost.of(config, dtypes), config.max_positions, prompts, ENGINE)
    plans = [priced.plan for priced in rank_plans(target, "latency")]
    chosen = next(plan for plan in plans if len(plan.replicas[0].stages[0].ranks) == 2)
    stage = chosen.replicas[0].stages[0]
    equal = Plan(replicas=(Replica((Stage((0, 1)),)),), engine=ENGINE)
    planned = Plan(replicas=(Replica((Stage(stage.ranks, 0, stage.shares),)),), engine=ENGINE)
    seconds = [
        target.costs(plan.resolve(config.shape, 2).replicas).replicas[0].step_s(_PREFILL) for plan in (equal, planned)
    ]
    found: dict[str, list[tuple[float, float]]] = {"equal": [], "planned": []}
    for _ in range(repeats):
        for name, plan in (("equal", equal), ("planned", planned)):
            found[name].append(tokens_per_s(controller, model, plan, count))
    line: dict[str, object] = {"shares": dict(zip(stage.ranks, stage.shares, strict=True))}
    for index, what in enumerate(("prefill", "decode")):
        medians = {name: statistics.median(pair[index] for pair in pairs) for name, pairs in found.items()}
        line[what] = {name: round(value, 1) for name, value in medians.items()}
        line[f"{what}_gain"] = round(medians["planned"] / medians["equal"], 3)
    line["predicted_prefill_gain"] = round(seconds[0] / seconds[1], 3)
    print(json.dumps(line), flush=True)


def main() -> int:
    rank = pin()
    model, repeats, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def measure_all(controller: Controller) -> None:
        measure(controller, model, repeats, count)

    if rank != _SLOW_RANK:
        return run_measurement(measure_all)
    with half_speed() as how:
        print(f"rank {rank} is slowed by {how}", file=sys.stderr, flush=True)
        return run_measurement(measure_all)


if __name__ == "__main__":
    sys.exit(main())
