"""From files to plans and their description: what `plan` reads and prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from lepton_dist.coordinator.cluster_document import read_cluster
from lepton_dist.coordinator.demand import Demand
from lepton_dist.coordinator.pricing import MEMORY_MARGIN, PRICE_ERROR, Priced, Target
from lepton_dist.coordinator.stage_cost import TERMS, ModelCost
from lepton_dist.coordinator.workload import RequestLengths, read_workload
from lepton_dist.errors import OutputError, UsageError
from lepton_dist.model.registry import read_model
from lepton_dist.plan.document import plan_to_yaml
from lepton_dist.plan.plan import EngineLimits, Plan, Precision, Replica
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.requests import Prepared, RequestMaker, checkpoint_sampling
from lepton_dist.text.dialects import is_text_path, open_input, read_rows
from lepton_dist.text.tokenizer import Tokenizer

_SHOWN = 5
_SHOWN_BAD_ROWS = 3


def load_target(
    model: str, cluster: str, workload: str, precision: Precision, limits: EngineLimits, options: Mapping[str, Any]
) -> tuple[Target, list[str]]:
    """What to plan for, and notes for the user. `options`: `max_tokens`, `output_tokens` or None each.

    Raises:
        UsageError: a file is wrong, or the workload holds no request that can be run.
    """
    machines = read_cluster(cluster)
    config, _ = read_model(model)
    dtypes = decide_dtypes(precision, None, config.dtype)
    requests, notes, is_endless = _requests(model, workload, options, config.shape.vocab, config.max_positions)
    if not requests:
        raise UsageError(
            f"--workload {workload}: holds no request that can be run; {'; '.join(notes) or 'it is empty'}"
        )
    costs = ModelCost(config.shape, dtypes, config.is_gated, config.is_tied)
    demand = Demand.of(requests, is_endless=is_endless)
    if demand.longest_tokens > config.max_positions:
        raise UsageError(
            f"--workload {workload}: a request of {demand.longest_tokens} tokens, but the model's context holds "
            f"{config.max_positions}"
        )
    if dtypes.notice:
        notes.append(dtypes.notice)
    return Target(machines, costs, config.max_positions, demand, limits), notes


def _requests(
    model: str, workload: str, options: Mapping[str, Any], vocab: int, context_tokens: int
) -> tuple[list[RequestLengths], list[str], bool]:
    """Lengths, notes, and whether they stand for an endless stream."""
    lengths = workload.split(",")
    if len(lengths) == 2 and all(part.strip().isdigit() for part in lengths):
        prompt, output = (int(part) for part in lengths)
        if prompt < 1 or output < 1:
            raise UsageError(f"--workload {workload}: prompt and output need at least 1 token each")
        return [RequestLengths(prompt, output, output)], [], True
    if _holds_lengths(workload):
        return read_workload(workload), [], False
    has_tokenizer = (Path(model) / "tokenizer.json").is_file()
    given = {name: value for name, value in options.items() if name == "max_tokens" and value is not None}
    maker = RequestMaker(
        Tokenizer.load(model) if has_tokenizer else None,
        given,
        checkpoint_sampling(model),
        vocab=vocab,
        context_tokens=context_tokens,
        base_seed=0,
    )
    requests, bad = [], []
    with open_input(workload) as lines:
        for row in read_rows(lines, is_text=is_text_path(workload)):
            item = maker.prepare(row)
            if not isinstance(item, Prepared):
                bad.append(f"line {item.line}: {item.message}")
                continue
            most = item.request.sampling.max_tokens
            output = min(most, options["output_tokens"] or most)
            requests += [RequestLengths(len(item.request.prompt), output, most)] * item.request.sampling.n
    notes = []
    if bad:
        notes.append(f"{len(bad)} bad row(s) left out: {'; '.join(bad[:_SHOWN_BAD_ROWS])}")
    if requests and not options["output_tokens"]:
        notes.append("outputs are priced at max_tokens, their bound; --output-tokens N prices what you expect instead")
    return requests, notes, False


def _holds_lengths(path: str) -> bool:
    """Whether a file is a workload of `simulate`: lengths instead of prompts."""
    if is_text_path(path):
        return False
    with open_input(path) as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        values = msgspec.json.decode(first)
    except msgspec.DecodeError:
        return False
    return isinstance(values, dict) and "prompt_tokens" in values


def described(target: Target, plans: Sequence[Priced], notes: Sequence[str]) -> str:
    """The chosen plan, the runners-up and why."""
    best, demand, cluster = plans[0], target.demand, target.cluster
    lines = [f"note: {text}" for text in notes]
    lines.append(
        f"{cluster.name}: {len(cluster.ranks)} rank(s) on {len(set(cluster.nodes))} node(s); "
        + ("requests" if demand.is_endless else f"{len(demand.requests)} requests")
        + f" of {demand.prompt_tokens:.0f} prompt and {demand.output_tokens:.0f} output tokens in the mean"
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
            f"        the workload takes {best.seconds:.1f} s, {_core_hours(target, best.seconds):.3g} core-hours of "
            f"this job's {_cores(target)} cores"
        )
    spare = sorted(set(range(len(cluster.ranks))) - best.plan.ranks)
    if spare:
        lines.append(f"        left out, for they would not pay: rank(s) {_ranges(spare)}")
    lines += [f"        {text}" for text in _memory_lines(target, best)]
    return "\n".join(lines)


def estimated(target: Target, best: Priced, objective: str, precision: Precision) -> Plan:
    """The plan to write, with what was predicted of it."""
    estimate: dict[str, Any] = {
        "cluster": target.cluster.name,
        "objective": objective,
        "tokens_per_s": round(best.tokens_per_s, 2),
        "tokens_per_s_range": [round(value, 2) for value in _bar(best)],
        "request_alone_s": round(best.latency_s, 4),
        "rank_bytes": max(best.fit.rank_bytes.values()),
    }
    if best.seconds is not None:
        estimate["seconds"] = round(best.seconds, 2)
        estimate["core_hours"] = round(_core_hours(target, best.seconds), 4)
    return replace(best.plan, precision=precision, estimate=estimate)


def check_writable(path: str) -> None:
    """Refuse before anything is planned.

    Raises:
        OutputError: the file cannot be made here.
    """
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir():
        raise OutputError(f"{path}: cannot be written: {folder if not folder.is_dir() else path} is no such place")


def write_plan(path: str, plan: Plan) -> None:
    """Write a plan file.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        Path(path).write_text("# Written by lepton-dist plan.\n" + plan_to_yaml(plan), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from None


def _bar(plan: Priced) -> tuple[float, float]:
    return plan.tokens_per_s * (1 - PRICE_ERROR), plan.tokens_per_s * (1 + PRICE_ERROR)


def _range(plan: Priced) -> str:
    low, high = _bar(plan)
    return f"{low:.1f} to {high:.1f}"


def _basis(plan: Priced) -> str:
    return "simulated" if plan.is_simulated else "with every replica full"


def _cores(target: Target) -> int:
    return sum(profile.threads for profile in target.cluster.ranks)


def _core_hours(target: Target, seconds: float) -> float:
    return seconds * _cores(target) / 3600


def _spent(target: Target, plan: Priced) -> str:
    """The two largest terms of a step of the first replica's slowest stage."""
    replica = plan.plan.replicas[0]
    cost = target.costs((replica,)).replicas[0]
    batch = target.demand.batch(target.limits, plan.fit.capacity_tokens[0], len(plan.plan.replicas))
    terms = cost.interval(target.demand.mean_step(batch, len(replica.stages), target.limits))
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
            f"{_ranges(sorted(ranks))}"
        )
    if len(rows) > _SHOWN:
        yield f"memory: less of what they have on the other {sum(len(ranks) for _, ranks in rows[_SHOWN:])} rank(s)"


def _ranges(ranks: Sequence[int]) -> str:
    """``0-3,8``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
