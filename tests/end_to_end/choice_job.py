"""How good the planner's first two plans are: every plan that it ranks, and every mesh of all ranks, measured.

``mpirun -n 2 python -m tests.end_to_end.choice_job MODEL [--requests 16] [--repeats 5] [--weights bfloat16] [--half]``.
The ranks are profiled first; plans then run in turn. With `--half` each rank has half a core: a CPU quota of its own,
which needs root. Rank 0 prints a JSON line a plan, the planner's first, and how near the better of its first two comes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import nullcontext
from itertools import product

from lepton_dist.bench.workload import Lengths, equal_lengths, make_requests, offline_lengths
from lepton_dist.coordinator.planner import rank_plans
from lepton_dist.coordinator.pricing import Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.model.parameters import matrix_kind
from lepton_dist.model.registry import read_model
from lepton_dist.plan.plan import Mesh, Plan, Precision, Replica
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.profiling import make_cluster
from tests.end_to_end.measuring import ENGINE, pin, run_measurement, seconds_for
from tests.end_to_end.slowness import half_speed


def meshes(size: int) -> list[Plan]:
    """Every regular grid of all ranks."""
    sizes = range(1, size + 1)
    found = [Mesh(*axes) for axes in product(sizes, repeat=3)]
    return [Plan(mesh=mesh) for mesh in found if mesh.size == size]


def tokens_per_s(controller: Controller, model: str, plan: Plan, lengths: list[Lengths]) -> float:
    """Of one run, after a short one."""
    blueprint = open_model(controller, ModelRequest(model, plan, None, 1))
    vocab = blueprint.config.shape.vocab
    seconds_for(controller, make_requests(equal_lengths(2 * len(blueprint.plan.replicas), 32, 4), vocab, 0))
    rate = sum(item.output for item in lengths) / seconds_for(controller, make_requests(lengths, vocab, 1))
    controller.close()
    return rate


def measure(controller: Controller, options: argparse.Namespace) -> None:
    config, _ = read_model(options.model)
    world, precision = controller.world, Precision(weights=options.weights)
    dtypes = decide_dtypes(precision, None, config.dtype)
    facts = controller.examine(kinds=sorted({dtypes.weights, matrix_kind("head.weight", dtypes.weights)}), threads=1)
    cluster = make_cluster("here", world.hosts, world.nodes, facts)
    lengths = offline_lengths(options.requests, seed=7)
    workload = Workload.of([RequestLengths(item.prompt, item.output, item.output) for item in lengths])
    ranked = rank_plans(Target(cluster, ModelCost.of(config, dtypes), config.max_positions, workload, ENGINE))
    predicted = {priced.plan.replicas: priced.tokens_per_s for priced in ranked}
    others = [plan.resolve(config.shape, world.size).replicas for plan in meshes(world.size)]
    measured: dict[tuple[Replica, ...], list[float]] = {replicas: [] for replicas in (*predicted, *others)}
    for _ in range(options.repeats):
        for replicas, rates in measured.items():
            plan = Plan(replicas=replicas, precision=precision, engine=ENGINE)
            rates.append(tokens_per_s(controller, options.model, plan, lengths))
    medians = [statistics.median(rates) for rates in measured.values()]
    for (replicas, rates), median in zip(measured.items(), medians, strict=True):
        price = predicted.get(replicas)
        line = {
            "replicas": [[[*stage.ranks, f"{stage.layers} layers"] for stage in item.stages] for item in replicas],
            "predicted": None if price is None else round(price, 1),
            "measured": round(median, 1),
            "range": [round(min(rates), 1), round(max(rates), 1)],
        }
        print(json.dumps(line), flush=True)
    print(json.dumps({"first_two_of_best": round(max(medians[:2]) / max(medians), 3)}), flush=True)


def main() -> int:
    rank = pin()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", default="bfloat16")
    parser.add_argument("--half", action="store_true")
    options = parser.parse_args()

    with half_speed() if options.half else nullcontext("not at all") as how:
        print(f"rank {rank} is slowed by {how}", file=sys.stderr, flush=True)
        return run_measurement(lambda controller: measure(controller, options))


if __name__ == "__main__":
    sys.exit(main())
