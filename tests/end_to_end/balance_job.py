"""Two replicas on two cores, one slowed by busy neighbours on its core: how near the makespan comes to the bound.

``mpirun -n 2 python -m tests.end_to_end.balance_job MODEL REQUESTS REPEATS NEIGHBOURS...``. Rank 0 prints a JSON line a
case. T_i is what replica i alone needs for the whole batch, slowed as in the test; the bound is 1 / sum(1 / T_i).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lepton_dist.bench.workload import make_requests, offline_lengths
from lepton_dist.comm.launcher import read_launcher
from lepton_dist.plan.plan import BALANCER_POLICIES, BalancerPolicy, EngineLimits, Plan, Replica, Stage
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.run import run

SLOW_RANK = 1
_CORES = sorted(os.sched_getaffinity(0))
_ENGINE = EngineLimits(max_sequences=16, prefix_cache=False, context_tokens=1024)


# Busy until the process that started it is gone, however that ended.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(10**5))"


class Neighbours:
    """Busy processes on the slow rank's core, each a session of its own: with n of them the rank gets 1 / (n + 1)."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, count: int) -> None:
        core = str(_CORES[SLOW_RANK])
        command = ["taskset", "-c", core, sys.executable, "-c", BUSY, str(os.getpid())]
        self._processes += [subprocess.Popen(command, start_new_session=True) for _ in range(count)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()


@contextmanager
def slowed(count: int) -> Iterator[Neighbours]:
    neighbours = Neighbours()
    try:
        neighbours.start(count)
        yield neighbours
    finally:
        neighbours.stop()


def timed(
    controller: Controller,
    model: str,
    ranks: tuple[int, ...],
    policy: BalancerPolicy,
    count: int,
    at_s: float = 0.0,
    then: tuple[Neighbours, int] | None = None,
) -> float:
    """Seconds from the first request to the last; `then` starts neighbours after `at_s`."""
    plan = Plan(replicas=tuple(Replica((Stage((rank,)),)) for rank in ranks), engine=replace(_ENGINE, balancer=policy))
    blueprint = open_model(controller, ModelRequest(model, plan, None, 1))
    vocab = blueprint.config.shape.vocab
    for request in make_requests(offline_lengths(2 * len(ranks), seed=1), vocab, seed=99):
        controller.submit(request)
    while controller.num_outstanding:
        controller.advance()
    requests = make_requests(offline_lengths(count, seed=7), vocab, seed=1)
    start = time.perf_counter()
    for request in requests:
        controller.submit(request)
    while controller.num_outstanding:
        controller.advance()
        if then is not None and time.perf_counter() - start > at_s:
            then[0].start(then[1])
            then = None
    seconds = time.perf_counter() - start
    controller.close()
    return seconds


def measure(controller: Controller, model: str, count: int, repeats: int, cases: list[int]) -> None:
    fast_s = statistics.median(timed(controller, model, (0,), "predicted", count) for _ in range(repeats))
    unslowed_s = statistics.median(timed(controller, model, (SLOW_RANK,), "predicted", count) for _ in range(repeats))
    for neighbours in cases:
        with slowed(neighbours):
            slow_s = statistics.median(
                timed(controller, model, (SLOW_RANK,), "predicted", count) for _ in range(repeats)
            )
            bound_s = 1 / (1 / fast_s + 1 / slow_s)
            makespans = {
                policy: [timed(controller, model, (0, 1), policy, count) / bound_s for _ in range(repeats)]
                for policy in BALANCER_POLICIES
            }
        tell(f"{neighbours} busy neighbours", fast_s, slow_s, bound_s, makespans)
        # It begins when a third of the bound of equal replicas is over.
        at_s = 1 / 3 / (1 / fast_s + 1 / unslowed_s)
        later_s = at_s + (1 - at_s / fast_s - at_s / unslowed_s) * bound_s
        runs = []
        for _ in range(repeats):
            with slowed(0) as beginning:
                runs.append(
                    timed(controller, model, (0, 1), "predicted", count, at_s, (beginning, neighbours)) / later_s
                )
        tell(f"{neighbours} busy neighbours from a third on", fast_s, slow_s, later_s, {"predicted": runs})


def tell(case: str, fast_s: float, slow_s: float, bound_s: float, makespans: dict[str, list[float]]) -> None:
    ratios = {policy: round(statistics.median(values), 3) for policy, values in makespans.items()}
    worst = {policy: round(max(values), 3) for policy, values in makespans.items()}
    times = {"fast_s": round(fast_s, 2), "slow_s": round(slow_s, 2), "bound_s": round(bound_s, 2)}
    print(json.dumps({"case": case, **times, "of_bound": ratios, "worst": worst}), flush=True)


def main() -> int:
    rank = read_launcher().rank
    os.sched_setaffinity(0, {_CORES[rank % len(_CORES)]})
    model, (count, repeats, *cases) = sys.argv[1], map(int, sys.argv[2:])

    def program(controller: Controller, interrupts: Interrupts) -> int:
        measure(controller, model, count, repeats, cases)
        return 0

    return run(program)


if __name__ == "__main__":
    sys.exit(main())
