"""The chosen plan, the runners-up and why, for people. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lepton_dist.coordinator.estimate import core_hours, error_bar, num_cores
from lepton_dist.coordinator.pricing import MEMORY_MARGIN, Priced, Target
from lepton_dist.coordinator.ranges import format_ranks
from lepton_dist.coordinator.stage_cost import TERMS
from lepton_dist.plan.plan import Plan, Replica

_SHOWN = 5


def described(target: Target, plans: Sequence[Priced], notes: Sequence[str]) -> str:
    """The chosen plan, the runners-up and why."""
    best, workload, cluster = plans[0], target.workload, target.cluster
    lines = [f"note: {text}" for text in notes]
    lines.append(
        f"{cluster.name}: {len(cluster.ranks)} rank(s) on {len(set(cluster.nodes))} node(s); "
        + ("requests" if workload.is_endless else f"{len(workload.requests)} requests")
        + f" of {workload.prompt_tokens:.0f} prompt and {workload.output_tokens:.0f} output tokens in the mean"
    )
    lines.append("")
    lines.append(f"{'':2}{'tokens/s':>10}  {'alone s':>8}  {'ranks':>5}  {'most time in':<32}  replicas")
    for number, plan in enumerate(plans[:_SHOWN], 1):
        lines.append(
            f"{number:<2}{plan.tokens_per_s:10.1f}  {plan.latency_s:8.2f}  {plan.num_ranks:5}  "
            f"{_spent(target, plan):<32}  {_replicas(plan.plan)}"
        )
    lines.append("")
    lines.append(f"plan 1: {best.tokens_per_s:.1f} output tokens/s, error bar {_range(best)}, " + _basis(best))
    if best.seconds is not None:
        lines.append(
            f"        the workload takes {best.seconds:.1f} s, {core_hours(target, best.seconds):.3g} core-hours of "
            f"this job's {num_cores(target)} cores"
        )
    spare = set(range(len(cluster.ranks))) - best.plan.ranks
    if spare:
        lines.append(f"        left out, for they would not pay: rank(s) {format_ranks(spare)}")
    lines += [f"        {text}" for text in _memory_lines(target, best)]
    return "\n".join(lines)


def _range(plan: Priced) -> str:
    low, high = error_bar(plan)
    return f"{low:.1f} to {high:.1f}"


def _basis(plan: Priced) -> str:
    return "simulated" if plan.is_simulated else "with every replica full"


def _spent(target: Target, plan: Priced) -> str:
    """The two largest terms of a step of the first replica's slowest stage."""
    replica = plan.plan.replicas[0]
    cost = target.costs((replica,)).replicas[0]
    batch = target.workload.batch(target.limits, plan.fit.capacity_tokens[0], len(plan.plan.replicas))
    terms = cost.interval(target.workload.mean_step(batch, len(replica.stages), target.limits))
    largest = sorted(zip(terms, TERMS, strict=True), reverse=True)[:2]
    return ", ".join(f"{name} {seconds / terms.total:.0%}" for seconds, name in largest)


def _replicas(plan: Plan) -> str:
    """Like replicas together: stages as width and layers."""
    counts = Counter(tuple(_stages(replica)) for replica in plan.replicas)
    return "; ".join(f"{count} x [{' > '.join(stages)}]" for stages, count in counts.items())


def _stages(replica: Replica) -> Iterator[str]:
    """``tp 2: 12 layers``, and ``3 stages of`` it where neighbours are alike."""
    run: list[tuple[int, int, tuple[float, ...]]] = []
    for stage in (*replica.stages, None):
        this = None if stage is None else (len(stage.ranks), stage.layers, stage.shares)
        if run and this != run[0]:
            width, layers, shares = run[0]
            uneven = f" shares {':'.join(f'{share:g}' for share in shares)}" if len(set(shares)) > 1 else ""
            yield (f"{len(run)} stages of " if len(run) > 1 else "") + f"tp {width}, {layers} layers{uneven}"
            run = []
        if this is not None:
            run.append(this)


def _memory_lines(target: Target, plan: Priced) -> Iterator[str]:
    """Memory by what ranks need and have, like ranks together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for rank, needed in plan.fit.rank_bytes.items():
        alike.setdefault((needed, target.cluster.ranks[rank].memory_bytes), []).append(rank)
    rows = sorted(alike.items(), key=lambda item: -item[0][0] / item[0][1])
    for (needed, have), ranks in rows[:_SHOWN]:
        yield (
            f"memory: {needed / 2**20:.1f} MiB of {have / 2**20:.0f} MiB ({MEMORY_MARGIN:.0%} kept free) on rank(s) "
            f"{format_ranks(ranks)}"
        )
    if len(rows) > _SHOWN:
        yield f"memory: less of what they have on the other {sum(len(ranks) for _, ranks in rows[_SHOWN:])} rank(s)"
