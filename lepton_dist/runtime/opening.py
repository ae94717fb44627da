"""Opening a model on the job: from a directory, a plan and options to a running session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lepton_dist.comm.world import World
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cluster_document import read_cluster
from lepton_dist.coordinator.decisions import Write
from lepton_dist.documents import Document, read_yaml
from lepton_dist.errors import ConfigError
from lepton_dist.plan.crossing import wide_stages
from lepton_dist.plan.document import plan_from_document, plan_to_yaml
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes, decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.head_start import head_start
from lepton_dist.runtime.messages import OpenSession
from lepton_dist.telemetry.voice import notice


@dataclass(frozen=True)
class ModelRequest:
    """What to open: `plan` None means tensor parallel inside nodes and pipelines between them.

    `cluster` is the job as it was measured, if it was.
    """

    model: str
    plan: Plan | None = None
    dtype: str | None = None
    threads: int = 0
    cluster: Cluster | None = None


def load_plan_document(path: str | None) -> tuple[Plan | None, Document | None]:
    """A plan file and its document, which knows the lines."""
    if path is None:
        return None, None
    document = read_yaml(path)
    return plan_from_document(document), document


def draw_blueprint(world: World, request: ModelRequest, document: Document | None = None) -> tuple[Blueprint, Dtypes]:
    """Fit the plan to the model and the world, before any rank loads anything.

    Raises:
        CheckpointError, ConfigError: as `Blueprint.draw`, with the place in the plan file.
    """
    plan = (request.plan or Plan()).laid_out(world.nodes)
    try:
        blueprint = Blueprint.draw(request.model, plan, world.size, head_start().take_checkpoint(request.model))
    except ConfigError as error:
        raise (document.located(error) if document is not None else error) from None
    on_gpus = all(blueprint.plan.device_of(stage) == "cuda" for r in blueprint.plan.replicas for stage in r.stages)
    return blueprint, decide_dtypes(plan.precision, request.dtype, blueprint.config.dtype, has_float16=on_gpus)


def named_cluster(plan: Plan | None, nodes: Sequence[int]) -> Cluster | None:
    """The cluster that a plan names, if it names one; `nodes` is the node of each rank of this job.

    Raises:
        ConfigError: the file is wrong, or it is of another number of ranks or another layout than the job.
    """
    if plan is None or plan.cluster is None:
        return None
    cluster = read_cluster(plan.cluster)
    cluster.check(nodes, plan.cluster)
    return cluster


def open_model(
    controller: Controller,
    request: ModelRequest,
    document: Document | None = None,
    *,
    is_dynamic: bool = True,
    write: Write | None = None,
    drawn: tuple[Blueprint, Dtypes] | None = None,
) -> Blueprint:
    """Open a session on every rank, and say what it holds; `is_dynamic` and `write` as in `Controller.open`.

    `drawn` is what `draw_blueprint` has given, if it was asked before.

    Raises:
        CheckpointError, ConfigError: the model or the plan is wrong.
        RankLostError: a rank was not ready in time.
    """
    world = controller.world
    blueprint, dtypes = drawn or draw_blueprint(world, request, document)
    for text in filter(None, (blueprint.checkpoint.notice, dtypes.notice)):
        notice(text)
    if not (request.plan and request.plan.has_layout) and world.size > 1:
        shown = plan_to_yaml(blueprint.plan).rstrip()
        notice(f"no layout is given: using the one below, which can be saved and given as a file\n{shown}")
    spare = sorted(set(range(world.size)) - blueprint.plan.ranks)
    if spare:
        notice(f"warning: the plan leaves out rank(s) {', '.join(map(str, spare))}")
    if wide := wide_stages(blueprint.plan, world.nodes):
        more = f" (and {len(wide) - 1} stages like it)" if len(wide) > 1 else ""
        notice(f"warning: {wide[0]}{more}; a stage on each node sends one message: lepton-dist inspect --link")
    order = OpenSession(
        model=str(Path(request.model).absolute()),
        plan=plan_to_yaml(blueprint.plan),
        weights=dtypes.weights,
        kv_cache=dtypes.kv_cache,
        wire=dtypes.wire,
        compute=dtypes.compute,
        threads=request.threads,
    )
    try:
        controller.open(blueprint, order, is_dynamic=is_dynamic, cluster=request.cluster, write=write)
    except ConfigError as error:
        raise (document.located(error) if document is not None else error) from None
    seated = [ready for ready in controller.ready.values() if ready.num_blocks]
    for text in dict.fromkeys(text for ready in seated for text in ready.notices):
        notice(text)
    gpus = [ready.device for ready in seated if ready.device != "cpu"]
    where = f", {len(gpus)} of them on GPUs" if gpus else ""
    tokens = [ready.num_blocks * blueprint.limits.block_tokens for ready in seated]
    notice(
        f"{blueprint.config.family}, weights {dtypes.weights}, {len(blueprint.plan.replicas)} replica(s) "
        f"on {len(seated)} rank(s){where}, {min(ready.threads for ready in seated)} thread(s) a rank, KV cache "
        f"{min(tokens)} tokens a replica ({max(ready.kv_bytes for ready in seated) / 2**20:.0f} MiB a rank at most)"
    )
    return blueprint
