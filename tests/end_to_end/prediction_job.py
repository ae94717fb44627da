"""How near predictions come: profile this machine, predict tokens/s and memory, run, compare.

``mpirun -n 2 python -m tests.end_to_end.prediction_job FOLDER [--models 160m,tiny] [--plans one,dp2,tp2,pp2]
[--workloads prompts,outputs,mixed] [--weights bfloat16] [--repeats 5] [--tries 3]``. Shapes are made in FOLDER and
kept. The cases of a model and plan are predicted from a profile taken right before them; a slice is chosen by the
options. Rank 0 prints a JSON line a case, then the table and the errors. A case whose repeats spread by more than a
tenth says more of the machine than of the prediction: it is profiled, predicted and measured again, ``--tries`` times
at most, and listed apart if all of them do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from lepton_dist.bench.memory import PeakMemory, rank_pids
from lepton_dist.bench.shapes import SHAPES, shaped_model
from lepton_dist.bench.workload import Lengths, equal_lengths, make_requests, offline_lengths
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.simulator import Simulator, kv_blocks
from lepton_dist.coordinator.workload import RequestLengths
from lepton_dist.model.parameters import matrix_kind
from lepton_dist.plan.plan import Plan, Precision, Replica, Stage
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.profiling import make_cluster
from tests.end_to_end.measuring import ENGINE, pin, run_measurement, seconds_for

PLANS = {
    "one": (Replica((Stage((0,)),)),),
    "dp2": (Replica((Stage((0,)),)), Replica((Stage((1,)),))),
    "tp2": (Replica((Stage((0, 1)),)),),
    "pp2": (Replica((Stage((0,)), Stage((1,)))),),
}
# Each some 15 s on two ranks: shared machines are twice as slow for seconds at a time.
WORKLOADS = {
    "prompts": equal_lengths(24, 512, 8),
    "outputs": equal_lengths(96, 32, 48),
    "mixed": offline_lengths(64, seed=7),
}
_SPREAD = 0.1


@dataclass(frozen=True)
class Case:
    """One case: medians over the repeats; bytes are those of the fullest rank. `peak_bytes` is how far one grew."""

    model: str
    plan: str
    workload: str
    predicted: float
    measured: float
    spread: float
    predicted_bytes: int
    held_bytes: int
    peak_bytes: int | None

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1)

    @property
    def memory_error(self) -> float:
        return abs(self.predicted_bytes / self.held_bytes - 1)


class Slice:
    """The cases of one model and plan: one session."""

    def __init__(self, controller: Controller, cluster: Cluster, folder: Path, name: str, plan: str, weights: str):
        self._controller, self._name, self._plan_name = controller, name, plan
        self._model = str(shaped_model(name, folder))
        self._plan = Plan(replicas=PLANS[plan], precision=Precision(weights=weights), engine=ENGINE)
        self._blueprint = Blueprint.draw(self._model, self._plan, controller.world.size)
        self._cluster = cluster
        config = self._blueprint.config
        dtypes = decide_dtypes(self._plan.precision, None, config.dtype)
        resolved = self._blueprint.plan
        self._costs = CostModel(
            cluster, resolved, config.shape, dtypes, is_gated=config.is_gated, is_tied=config.is_tied
        )
        self._blocks = kv_blocks(resolved, self._costs, cluster, self._blueprint.most_blocks())

    def predict(self, workload: str) -> float:
        """Tokens/s as the simulator tells them."""
        requests = [RequestLengths(item.prompt, item.output, item.output) for item in WORKLOADS[workload]]
        return Simulator(self._blueprint.plan, self._costs, self._blocks).run(requests).tokens_per_s

    def predicted_bytes(self) -> int:
        """Of the fullest rank."""
        return max(
            int(held + blocks * ENGINE.block_tokens * token)
            for cost, blocks in zip(self._costs.replicas, self._blocks, strict=True)
            for stage in cost.stages
            for held, token in zip(stage.held_bytes, stage.kv_token_bytes, strict=True)
        )

    def run(self, workloads: list[str], repeats: int) -> list[Case]:
        """Predict, then measure."""
        controller = self._controller
        predicted = {workload: self.predict(workload) for workload in workloads}
        memory = PeakMemory(rank_pids(controller.world.size))
        memory.reset()
        before = memory.bytes()
        open_model(controller, ModelRequest(self._model, self._plan, None, 1))
        self._seconds(equal_lengths(4, 64, 16), 0)
        cases = []
        for workload in workloads:
            lengths = WORKLOADS[workload]
            tokens = sum(item.output for item in lengths)
            rates = [tokens / self._seconds(lengths, 1 + repeat) for repeat in range(repeats)]
            middle = statistics.median(rates)
            peak = memory.bytes()
            case = Case(
                self._name,
                self._plan_name,
                workload,
                round(predicted[workload], 2),
                round(middle, 2),
                round((max(rates) - min(rates)) / middle, 3),
                self.predicted_bytes(),
                max(ready.weight_bytes + ready.kv_bytes for ready in controller.ready.values()),
                None if peak is None or before is None else peak - before,
            )
            print(json.dumps({**asdict(case), "error": round(case.error, 3)}), flush=True)
            cases.append(case)
        controller.close()
        return cases

    def _seconds(self, lengths: list[Lengths], seed: int) -> float:
        return seconds_for(self._controller, make_requests(lengths, self._blueprint.config.shape.vocab, seed))


def measure(controller: Controller, options: argparse.Namespace) -> None:
    world, folder = controller.world, Path(options.folder)
    kinds = sorted({options.weights, matrix_kind("head.weight", options.weights)})
    cases: list[Case] = []
    for name, plan in itertools.product(options.models, options.plans):
        workloads = options.workloads
        for tries in range(options.tries, 0, -1):
            facts = controller.examine(kinds=kinds, threads=1)
            cluster = make_cluster("here", world.hosts, world.nodes, facts)
            part = Slice(controller, cluster, folder, name, plan, options.weights)
            done = part.run(workloads, options.repeats)
            cases += [case for case in done if case.spread <= _SPREAD or tries == 1]
            workloads = [case.workload for case in done if case.spread > _SPREAD]
            if not workloads:
                break
    tell("cases", [case for case in cases if case.spread <= _SPREAD])
    tell("cases whose repeats spread by more than a tenth", [case for case in cases if case.spread > _SPREAD])


def tell(title: str, cases: list[Case]) -> None:
    if not cases:
        return
    print(
        f"\n{title}\n{'model':6}{'plan':5}{'workload':9}{'predicted':>10}{'measured':>10}{'error':>8}{'spread':>8}  MiB"
    )
    for case in cases:
        peak = "?" if case.peak_bytes is None else f"{case.peak_bytes / 2**20:.0f}"
        print(
            f"{case.model:6}{case.plan:5}{case.workload:9}{case.predicted:10.1f}{case.measured:10.1f}{case.error:8.1%}"
            f"{case.spread:8.1%}  {case.predicted_bytes / 2**20:.0f} predicted, {case.held_bytes / 2**20:.0f} held, "
            f"grew by {peak}"
        )
    errors = [case.error for case in cases]
    print(
        f"{len(cases)} {title}: tokens/s {statistics.median(errors):.1%} off in the median, {max(errors):.1%} at "
        f"worst; memory {max(case.memory_error for case in cases):.1%} at worst",
        flush=True,
    )


def main() -> int:
    pin()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for name, known in (("models", [*SHAPES]), ("plans", [*PLANS]), ("workloads", [*WORKLOADS])):
        default = ["160m", "tiny"] if name == "models" else known
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=default, help=", ".join(known))
    parser.add_argument("--weights", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tries", type=int, default=3)
    options = parser.parse_args()

    return run_measurement(lambda controller: measure(controller, options))


if __name__ == "__main__":
    sys.exit(main())
