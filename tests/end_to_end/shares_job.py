"""A group of two ranks, one at half speed: tokens/s with equal shares and with the planner's.

``mpirun -n 2 python -m tests.end_to_end.shares_job MODEL REPEATS PROMPTS``. Rank 1 has a CPU quota of 5 ms in 10 ms
where control groups allow it, else a busy neighbour. The ranks are measured so, and the planner is asked for the best
group of both for prompts of 512 tokens. Rank 0 prints a JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lepton_dist.bench.workload import Lengths, equal_lengths, make_requests
from lepton_dist.comm.launcher import read_launcher
from lepton_dist.coordinator.planner import rank_plans
from lepton_dist.coordinator.pricing import Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import RequestLengths, Workload
from lepton_dist.engine.work import StepWork, chunk_pairs
from lepton_dist.model.registry import read_model
from lepton_dist.plan.plan import EngineLimits, Plan, Precision, Replica, Stage
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.profiling import make_cluster
from lepton_dist.runtime.run import run
from tests.end_to_end.balance_job import SLOW_RANK, slowed
from tests.end_to_end.timed import seconds_for

_CORES = sorted(os.sched_getaffinity(0))
_PERIOD_US = 10_000
_ENGINE = EngineLimits(max_sequences=16, prefix_cache=False, context_tokens=1024)
_PREFILL = StepWork(512, 1, 1, 0, chunk_pairs(0, 512))


@contextmanager
def half_speed() -> Iterator[str]:
    """This process at half its speed; how that was done."""
    group = _make_group()
    if group is None:
        with slowed(1):
            yield "a busy neighbour"
        return
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield "a quota of 5 ms in 10 ms"
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _make_group() -> Path | None:
    """A control group (version 1 or 2) with the quota; None where that is not allowed."""
    first = {"cpu.cfs_period_us": f"{_PERIOD_US}", "cpu.cfs_quota_us": f"{_PERIOD_US // 2}"}
    second = {"cpu.max": f"{_PERIOD_US // 2} {_PERIOD_US}"}
    for root, files in (("/sys/fs/cgroup/cpu", first), ("/sys/fs/cgroup", second), ("/sys/fs/cgroup", first)):
        group = Path(root, f"lepton-shares-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in files.items():
                if not (group / name).exists():
                    raise OSError(name)
                (group / name).write_text(value)
            return group
        except OSError:
            group.rmdir()
    return None


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
    target = Target(cluster, ModelCost.of(config, dtypes), config.max_positions, prompts, _ENGINE)
    plans = [priced.plan for priced in rank_plans(target, "latency")]
    chosen = next(plan for plan in plans if len(plan.replicas[0].stages[0].ranks) == 2)
    stage = chosen.replicas[0].stages[0]
    equal = Plan(replicas=(Replica((Stage((0, 1)),)),), engine=_ENGINE)
    planned = Plan(replicas=(Replica((Stage(stage.ranks, 0, stage.shares),)),), engine=_ENGINE)
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
    rank = read_launcher().rank
    os.sched_setaffinity(0, {_CORES[rank % len(_CORES)]})
    model, repeats, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def program(controller: Controller, interrupts: Interrupts) -> int:
        measure(controller, model, repeats, count)
        return 0

    if rank != SLOW_RANK:
        return run(program)
    with half_speed() as how:
        print(f"rank {rank} is slowed by {how}", file=sys.stderr, flush=True)
        return run(program)


if __name__ == "__main__":
    sys.exit(main())
