"""Two replicas on two cores, one slowed by busy neighbours on its core: how near the makespan comes to the bound.

``mpirun -n 2 python -m tests.end_to_end.balance_job MODEL [--requests 400] [--repeats 5] [--alone 2] [--neighbours 1,3]
[--policies predicted,round_robin] [--weights bfloat16]``. Rank 0 prints a JSON line a case. T_i is what replica i alone
needs for the whole batch, slowed as in the test; the bound is 1 / sum(1 / T_i). Machines drift: T_i is the mean of runs
before and after those of both. ``--policies ""`` leaves out all but neighbours that come in mid-run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace

from lepton_dist.bench.workload import make_requests, offline_lengths
from lepton_dist.plan.plan import BALANCER_POLICIES, BalancerPolicy, Plan, Precision, Replica, Stage
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, open_model
from tests.end_to_end.measuring import CORES, ENGINE, pin, run_measurement, seconds_for
from tests.end_to_end.slowness import Neighbours, slowed

SLOW_RANK = 1


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
        plan = Plan(replicas=replicas, precision=self._precision, engine=replace(ENGINE, balancer=policy))
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
    with slowed(CORES[SLOW_RANK], neighbours):
        slow = [batch.seconds((SLOW_RANK,)) for _ in before]
        makespans = {
            policy: [batch.seconds((0, 1), policy) for _ in range(options.repeats if policy == "predicted" else 1)]
            for policy in options.policies
        }
        slow += [batch.seconds((SLOW_RANK,)) for _ in after]
    fast += [batch.seconds((0,)) for _ in after]
    fast_s, slow_s = statistics.mean(fast), statistics.mean(slow)
    bound_s = 1 / (1 / fast_s + 1 / slow_s)
    if makespans:
        tell(f"{neighbours} busy neighbours", fast_s, slow_s, bound_s, makespans)
    unslowed_s = batch.seconds((SLOW_RANK,))
    # It begins when a third of the bound of equal replicas is over.
    at_s = 1 / 3 / (1 / fast_s + 1 / unslowed_s)
    later_s = at_s + (1 - at_s / fast_s - at_s / unslowed_s) * bound_s
    runs = []
    for _ in range(options.repeats):
        with slowed(CORES[SLOW_RANK], 0) as beginning:
            runs.append(batch.seconds((0, 1), "predicted", at_s, (beginning, neighbours)))
    tell(f"{neighbours} busy neighbours from a third on", fast_s, slow_s, later_s, {"predicted": runs})


def tell(case: str, fast_s: float, slow_s: float, bound_s: float, makespans: dict[str, list[float]]) -> None:
    ratios = {policy: round(statistics.median(values) / bound_s, 3) for policy, values in makespans.items()}
    worst = {policy: round(max(values) / bound_s, 3) for policy, values in makespans.items()}
    times = {"fast_s": round(fast_s, 2), "slow_s": round(slow_s, 2), "bound_s": round(bound_s, 2)}
    print(json.dumps({"case": case, **times, "of_bound": ratios, "worst": worst}), flush=True)


def main() -> int:
    pin()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name, default in (("requests", 400), ("repeats", 5), ("alone", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--neighbours", type=lambda text: [int(count) for count in text.split(",")], default=[1, 3])
    parser.add_argument("--policies", type=lambda text: text.split(",") if text else [], default=BALANCER_POLICIES)
    parser.add_argument("--weights", default="bfloat16")
    options = parser.parse_args()

    def measure_all(controller: Controller) -> None:
        for neighbours in options.neighbours:
            measure(Batch(controller, options), options, neighbours)

    return run_measurement(measure_all)


if __name__ == "__main__":
    sys.exit(main())
