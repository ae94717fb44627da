"""`mesh: auto`: the planner inside the job, for its machines and its input."""

from __future__ import annotations

import time

from lepton_dist.config.generate import GenerateConfig
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.estimate import estimated
from lepton_dist.coordinator.plan_text import described
from lepton_dist.coordinator.planner import rank_plans
from lepton_dist.coordinator.pricing import Target
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.coordinator.workload import Workload
from lepton_dist.errors import UsageError
from lepton_dist.model.parameters import matrix_kind
from lepton_dist.parallel.checkpoint import planned_config
from lepton_dist.plan.document import plan_to_yaml
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes, decide_dtypes
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.planning import read_lengths
from lepton_dist.runtime.profiling import make_cluster
from lepton_dist.telemetry.voice import notice


def plan_here(
    controller: Controller, config: GenerateConfig, plan: Plan, cluster: Cluster | None
) -> tuple[Plan, Cluster]:
    """The best plan for the run's input, told with why, and the cluster that it was made for.

    An automatic `plan` gives precision and limits. Without a `cluster` the ranks measure themselves.

    Raises:
        UsageError: no row of the input can be run, or the model fits on no plan.
        RankLostError: a rank did not answer in time.
    """
    model = planned_config(config.model)
    dtypes = decide_dtypes(plan.precision, config.dtype, model.dtype)
    asked = plan.engine.context_tokens
    context_tokens = model.max_positions if asked == "auto" else min(asked, model.max_positions)
    found = read_lengths(
        config.input, config.model, config.sampling, vocab=model.shape.vocab, context_tokens=context_tokens
    )
    if not found.requests:
        raise UsageError(
            f"{config.input}: holds no request that can be run, so that `mesh: auto` has nothing to plan for; "
            + ("; ".join(found.notes) or "it is empty")
        )
    machines = _measured(controller, dtypes, config.threads) if cluster is None else cluster
    target = Target(
        machines, ModelCost.of(model, dtypes), model.max_positions, Workload.of(found.requests), plan.engine
    )
    plans = rank_plans(target)
    chosen = estimated(target, plans[0], "throughput", plan.precision, plan.cluster)
    why = described(target, plans, found.notes)
    notice(f"mesh: auto, planned for {config.input}\n{why}\n\nplan 1 in full:\n{plan_to_yaml(chosen).rstrip()}")
    return chosen, machines


def _measured(controller: Controller, dtypes: Dtypes, threads: int) -> Cluster:
    """What the ranks of this job are, and how fast with the weights of this run."""
    start_s = time.perf_counter()
    kinds = sorted({dtypes.weights, matrix_kind("head.weight", dtypes.weights)})
    facts = controller.examine(kinds=kinds, threads=threads)
    world = controller.world
    cluster = make_cluster("this job", world.hosts, world.nodes, facts)
    seconds = time.perf_counter() - start_s
    notice(f"the plan names no `cluster`: {world.size} rank(s) were measured in {seconds:.1f} s")
    return cluster
