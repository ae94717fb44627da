"""A simulation from files to a summary, a trace and a picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from io import BytesIO

from lepton_dist.bench.planning import load_lengths
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cluster_document import read_cluster
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.simulator import Simulated, Simulator, kv_blocks
from lepton_dist.coordinator.timeline import chrome_trace
from lepton_dist.coordinator.workload import RequestLengths
from lepton_dist.errors import ConfigError, UsageError
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.decision_log import decision_log
from lepton_dist.runtime.opening import load_plan_document
from lepton_dist.storage.outputs import write_output
from lepton_dist.telemetry.voice import notice

_MOST_ROWS = 32


@dataclass(frozen=True)
class Simulation:
    """What to simulate."""

    plan: Plan
    cluster: Cluster
    costs: CostModel
    num_blocks: list[int]
    workload: list[RequestLengths]

    def run(self, decisions: str | None = None) -> Simulated:
        """Simulate, with the balancer's log in the file `decisions` if one is named.

        Raises:
            UsageError: the log cannot be written, or a request does not fit.
        """
        with decision_log(decisions) as write:
            return Simulator(self.plan, self.costs, self.num_blocks, write=write).run(self.workload)


def load_simulation(model: str, cluster: str, plan: str, workload: str, dtype: str | None) -> Simulation:
    """Read everything, and fit the plan to the model and the cluster.

    Raises:
        UsageError: a file is wrong, or the model does not fit.
    """
    wanted, document = load_plan_document(plan)
    if wanted is None or document is None:
        raise UsageError("--plan: a plan is needed")
    machines = read_cluster(cluster)
    try:
        blueprint = Blueprint.draw(model, wanted, len(machines.ranks))
        config = blueprint.config
        found = load_lengths(model, workload, {"output_tokens": None}, config)
        dtypes = decide_dtypes(wanted.precision, dtype, config.dtype)
        costs = CostModel(
            machines, blueprint.plan, config.shape, dtypes, is_gated=config.is_gated, is_tied=config.is_tied
        )
        blocks = kv_blocks(blueprint.plan, costs, machines, blueprint.most_blocks())
    except ConfigError as error:
        raise document.located(error) from None
    for note in found.notes:
        notice(note)
    if not found.requests:
        raise UsageError(f"--workload {workload}: holds no request that can be run")
    return Simulation(blueprint.plan, machines, costs, blocks, found.requests)


def summary(plan: Plan, result: Simulated) -> str:
    """Throughput, latencies, and how idle each stage is."""
    lines = [
        f"{len(result.latencies_s)} requests, {result.prompt_tokens} prompt and {result.output_tokens} output tokens",
        f"makespan {result.makespan_s:.2f} s, {result.tokens_per_s:.1f} output tokens/s",
        f"latency {_spread(result.latencies_s)}; first token {_spread(result.first_token_s)}",
        f"preemptions {result.num_preemptions}, requests taken back {result.num_taken_back}",
        f"{'replica':>7}  {'stage':>5}  {'ranks':<16}  {'idle':>6}",
    ]
    rows = sorted(result.lanes)
    if len(rows) > _MOST_ROWS:
        rows = sorted(sorted(rows, key=lambda row: -result.idle(*row))[:_MOST_ROWS])
        lines[-1] += f"   (the {_MOST_ROWS} most idle of {len(result.lanes)} stages)"
    for replica, stage in rows:
        ranks = ",".join(map(str, plan.replicas[replica].stages[stage].ranks))
        lines.append(f"{replica:7}  {stage:5}  {ranks:<16}  {result.idle(replica, stage):6.1%}")
    return "\n".join(lines)


def write_trace(path: str, plan: Plan, result: Simulated) -> None:
    """Write the timeline.

    Raises:
        OutputError: the file cannot be written.
    """
    ranks = {(r, s): plan.replicas[r].stages[s].ranks for r, s in result.lanes}
    write_output(path, json.dumps(chrome_trace(result.lanes, ranks)) + "\n")


def write_picture(path: str, plan: Plan, result: Simulated) -> None:
    """Write a PNG: a row a stage, darker where it is busier.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # an optional extra; `check_plotting` has been asked

    rows = sorted(result.lanes)
    picture = Figure(figsize=(9.0, max(2.0, min(0.2 * len(rows) + 1.0, 30.0))), layout="constrained")
    axes = picture.subplots()
    for height, row in enumerate(rows):
        spans = result.lanes[row].spans
        bars = [(span.start_s, span.end_s - span.start_s) for span in spans]
        shades = [(0.27, 0.47, 0.67, span.busy_s / max(span.end_s - span.start_s, 1e-12)) for span in spans]
        axes.broken_barh(bars, (height - 0.4, 0.8), facecolors=shades)
    names = [f"replica {r}, ranks {','.join(map(str, plan.replicas[r].stages[s].ranks))}" for r, s in rows]
    if len(rows) <= 2 * _MOST_ROWS:
        axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel("seconds")
    axes.set_xlim(0.0, result.makespan_s)
    drawn = BytesIO()
    picture.savefig(drawn, format="png", dpi=100)
    write_output(path, drawn.getvalue())


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{statistics.median(ordered):.3f} s in the median, {high:.3f} s at 95 %"
