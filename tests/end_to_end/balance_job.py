"""Two replicas on two cores, one slowed by busy neighbours on its core: how near the makespan comes to the bound.

``mpirun -n 2 python -m tests.end_to_end.balance_job MODEL [--requests 400] [--repeats 5] [--alone 2] [--neighbours 1,3]
[--policies predicted,round_robin] [--weights bfloat16]``. Rank 0 prints a JSON line a case. T_i is what replica i alone
needs for the whole batch, slowed as in the test; the bound is 1 / sum(1 / T_i). Machines drift: T_i is the mean of runs
before and after those of both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lepton_dist.bench.workload import make_requests, offline_lengths
from lepton_dist.comm.launcher import read_launcher
from lepton_dist.plan.plan import BALANCER_POLICIES, BalancerPolicy, EngineLimits, Plan, Precision, Replica, Stage
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.run import run
from tests.end_to_end.timed import seconds_for

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


class Batch:
    """One batch of requests, run by any of the replicas."""

    def __init__(self, controller: Controller, options: argparse.Namespace) -> None:
        self._controller, self._model, self._count = controller, options.model, options.requests
        self._precision = Precision(weights=options.weights)

    def seconds(
        self,
        ranks: tuple[int, ...],
        policy: BalancerPolicy = "predicted",
        at_s: float = 0.0,
        then: tuple[Neighbours, int] | None = None,
    ) -> float:
        """From the first request to the last; `then` starts neighbours after `at_s`."""
        controller = self._controller
        replicas = tuple(Replica((Stage((rank,)),)) for rank in ranks)
        plan = Plan(replicas=replicas, precision=self._precision, engine=replace(_ENGINE, balancer=policy))
        blueprint = open_model(controller, ModelRequest(self._model, plan, None, 1))
        vocab = blueprint.config.shape.vocab
        seconds_for(controller, make_requests(offline_lengths(2 * len(ranks), seed=1), vocab, seed=99))
        waiting = [] if then is None else [then]

        def meanwhile(so_far_s: float) -> None:
            if waiting and so_far_s > at_s:
                neighbours, count = waiting.pop()
                neighbours.start(count)

        requests = make_requests(offline_lengths(self._count, seed=7), vocab, seed=1)
        seconds = seconds_for(controller, requests, meanwhile)
        controller.close()
        print(f"{policy} on ranks {ranks}: {seconds:.1f} s", file=sys.stderr, flush=True)
        return seconds


def measure(batch: Batch, options: argparse.Namespace, neighbours: int) -> None:
    before, after = range((options.alone + 1) // 2), range(options.alone // 2)
    fast = [batch.seconds((0,)) for _ in before]
    with slowed(neighbours):
        slow = [batch.seconds((SLOW_RANK,)) for _ in before]
        makespans = {
            policy: [batch.seconds((0, 1), policy) for _ in range(options.repeats if policy == "predicted" else 1)]
            for policy in options.policies
        }
        slow += [batch.seconds((SLOW_RANK,)) for _ in after]
    fast += [batch.seconds((0,)) for _ in after]
    fast_s, slow_s = statistics.mean(fast), statistics.mean(slow)
    bound_s = 1 / (1 / fast_s + 1 / slow_s)
    tell(f"{neighbours} busy neighbours", fast_s, slow_s, bound_s, makespans)
    unslowed_s = batch.seconds((SLOW_RANK,))
    # It begins when a third of the bound of equal replicas is over.
    at_s = 1 / 3 / (1 / fast_s + 1 / unslowed_s)
    later_s = at_s + (1 - at_s / fast_s - at_s / unslowed_s) * bound_s
    runs = []
    for _ in range(options.repeats):
        with slowed(0) as beginning:
            runs.append(batch.seconds((0, 1), "predicted", at_s, (beginning, neighbours)))
    tell(f"{neighbours} busy neighbours from a third on", fast_s, slow_s, later_s, {"predicted": runs})


def tell(case: str, fast_s: float, slow_s: float, bound_s: float, makespans: dict[str, list[float]]) -> None:
    ratios = {policy: round(statistics.median(values) / bound_s, 3) for policy, values in makespans.items()}
    worst = {policy: round(max(values) / bound_s, 3) for policy, values in makespans.items()}
    times = {"fast_s": round(fast_s, 2), "slow_s": round(slow_s, 2), "bound_s": round(bound_s, 2)}
    print(json.dumps({"case": case, **times, "of_bound": ratios, "worst": worst}), flush=True)


def main() -> int:
    rank = read_launcher().rank
    os.sched_setaffinity(0, {_CORES[rank % len(_CORES)]})
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name, default in (("requests", 400), ("repeats", 5), ("alone", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--neighbours", type=lambda text: [int(count) for count in text.split(",")], default=[1, 3])
    parser.add_argument("--policies", type=lambda text: text.split(","), default=BALANCER_POLICIES)
    parser.add_argument("--weights", default="bfloat16")
    options = parser.parse_args()

    def program(controller: Controller, interrupts: Interrupts) -> int:
        for neighbours in options.neighbours:
            measure(Batch(controller, options), options, neighbours)
        return 0

    return run(program)


if __name__ == "__main__":
    sys.exit(main())
