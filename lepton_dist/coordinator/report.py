"""What a run was predicted to take and took, and how busy every rank was. Pure: a record in, data and text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lepton_dist.coordinator.cost_model import Errors, TermRow
from lepton_dist.coordinator.stage_cost import TERMS, Terms

IDLE_LIMIT = 0.1
NUM_BUCKETS = 120
_SHOWN_AUDIT_LINES = 20
_SHOWN_REPLICAS = 4


@dataclass(frozen=True)
class Span:
    """One step of a replica, or several on end: from `start_s` of the run, `seconds` long, `busy_s` of it in steps.

    `tokens` are those that were generated; `predicted` are the prior's terms, added up over the steps.
    """

    start_s: float
    seconds: float
    busy_s: float
    num_steps: int
    tokens: int
    predicted: Terms


@dataclass(frozen=True)
class ReplicaRecord:
    """A replica's steps in order of time, and what the cost model learned from them (`CostModel.errors`, `.table`)."""

    spans: tuple[Span, ...]
    num_requests: int = 0
    errors: Errors | None = None
    terms: tuple[TermRow, ...] = ()


@dataclass(frozen=True)
class RankRecord:
    """A rank, the index of its replica (None for a spare one), and the part of a step in which it computes."""

    rank: int
    host: str
    replica: int | None
    share: float = 1.0


@dataclass(frozen=True)
class RunRecord:
    """A run of `seconds` from its first request to its last answer.

    `prior` says from what steps were predicted before any was seen, and `is_prior_measured` whether that was measured
    on these machines; `predicted_tokens_per_s` is the plan's estimate.
    """

    seconds: float
    replicas: tuple[ReplicaRecord, ...]
    ranks: tuple[RankRecord, ...]
    prior: str
    predicted_tokens_per_s: float | None = None
    is_prior_measured: bool = True


def make_report(record: RunRecord) -> dict[str, Any]:
    """The report as plain data, ready for JSON. Times are seconds of the run."""
    loads = [_load(replica, record.seconds) for replica in record.replicas]
    tokens = sum(span.tokens for replica in record.replicas for span in replica.spans)
    return {
        "seconds": record.seconds,
        "tokens": tokens,
        "tokens_per_s": tokens / record.seconds if record.seconds else 0.0,
        "predicted_tokens_per_s": record.predicted_tokens_per_s,
        "prior": record.prior,
        "is_prior_measured": record.is_prior_measured,
        "bucket_s": record.seconds / NUM_BUCKETS,
        "replicas": [_replica(index, replica) for index, replica in enumerate(record.replicas)],
        "ranks": [_rank(rank, record, loads) for rank in record.ranks],
        "audit": [line for rank in record.ranks if (line := _audit(rank, record))],
    }


def _replica(index: int, replica: ReplicaRecord) -> dict[str, Any]:
    busy_s = sum(span.busy_s for span in replica.spans)
    predicted = [sum(values) for values in zip(*(span.predicted for span in replica.spans), strict=True)] or [0.0] * 6
    factors = {row.term: row.factor for row in replica.terms}
    learned = [factors.get(term, 1.0) * seconds for term, seconds in zip(TERMS, predicted, strict=True)]
    # Only the whole step is measured: its seconds are laid to the terms in the proportions that were learned.
    scale = busy_s / sum(learned) if sum(learned) else 0.0
    return {
        "replica": index,
        "requests": replica.num_requests,
        "steps": sum(span.num_steps for span in replica.spans),
        "tokens": sum(span.tokens for span in replica.spans),
        "measured_s": busy_s,
        "predicted_s": sum(predicted) or None,
        "errors": None if replica.errors is None else asdict(replica.errors),
        "terms": [
            {"term": term, "predicted_s": seconds, "measured_s": scale * value, "factor": factors.get(term, 1.0)}
            for term, seconds, value in zip(TERMS, predicted, learned, strict=True)
            if sum(predicted)
        ],
    }


def _rank(rank: RankRecord, record: RunRecord, loads: Sequence[list[float]]) -> dict[str, Any]:
    load = [0.0] * NUM_BUCKETS if rank.replica is None else [rank.share * value for value in loads[rank.replica]]
    return {
        "rank": rank.rank,
        "host": rank.host,
        "replica": rank.replica,
        "busy": sum(load) / NUM_BUCKETS,
        "load": [round(value, 3) for value in load],
    }


def _load(replica: ReplicaRecord, seconds: float) -> list[float]:
    """The busy part of each bucket of the run."""
    bucket_s = seconds / NUM_BUCKETS
    load = [0.0] * NUM_BUCKETS
    for span in replica.spans if bucket_s > 0 else ():
        start = min(max(span.start_s, 0.0), seconds)
        end = min(span.start_s + span.seconds, seconds)
        density = span.busy_s / span.seconds if span.seconds > 0 else 0.0
        for index in range(int(start / bucket_s), min(int(end / bucket_s) + 1, NUM_BUCKETS)):
            overlap = min(end, (index + 1) * bucket_s) - max(start, index * bucket_s)
            load[index] += max(overlap, 0.0) * density / bucket_s
    return [min(value, 1.0) for value in load]


def _audit(rank: RankRecord, record: RunRecord) -> str:
    """Why a rank was idle for more than a tenth of the run, the largest cause first; empty where it was not."""
    who = f"rank {rank.rank} on {rank.host}"
    if rank.replica is None:
        return f"{who} was idle for the whole run: the plan leaves it out"
    spans = record.replicas[rank.replica].spans
    if not spans:
        return f"{who} was idle for the whole run: replica {rank.replica} got no request"
    busy_s = sum(span.busy_s for span in spans)
    idle_s = record.seconds - rank.share * busy_s
    if idle_s <= IDLE_LIMIT * record.seconds:
        return ""
    begin_s, end_s = spans[0].start_s, record.seconds - spans[-1].start_s - spans[-1].seconds
    causes = [
        ((1 - rank.share) * busy_s, "while it waited for slower ranks of its replica: give it a larger share"),
        (begin_s, "before the first step of its replica"),
        (end_s, "at the end, when its replica had no work left and others had"),
        (record.seconds - busy_s - begin_s - end_s, "between steps: too few requests, or the leader was held up"),
    ]
    told = [f"{seconds:.1f} s {why}" for seconds, why in sorted(causes, reverse=True) if seconds > idle_s / 5]
    return f"{who} was idle {100 * idle_s / record.seconds:.0f} % of {record.seconds:.1f} s: {'; '.join(told)}"


def report_text(report: dict[str, Any]) -> str:
    """The report as a table for people, with the audit below it.

    Predictions for machines that nobody has measured are left out: they are off by factors, and mean nothing.
    """
    if not report["is_prior_measured"]:
        return "\n".join((*_plain_lines(report), *_shown_audit(report)))
    lines = [
        f"{'replica':>7}{'requests':>10}{'steps':>8}{'tokens':>9}{'measured':>11}{'predicted':>11}  error of a step"
    ]
    for row in report["replicas"]:
        errors = row["errors"]
        told = "not measured" if errors is None else _errors_text(errors)
        lines.append(
            f"{row['replica']:>7}{row['requests']:>10}{row['steps']:>8}{row['tokens']:>9}"
            f"{row['measured_s']:>9.2f} s{_seconds(row['predicted_s']):>11}  {told}"
        )
    if any(row["terms"] for row in report["replicas"]):
        lines += ["", *_term_lines(report)]
    expected = report["predicted_tokens_per_s"]
    against = "" if expected is None else f", {expected:.1f} predicted"
    lines += [
        "",
        f"predicted from {report['prior']}",
        f"{report['tokens']} tokens in {report['seconds']:.1f} s: {report['tokens_per_s']:.1f} tokens/s{against}",
    ]
    return "\n".join((*lines, *_shown_audit(report)))


def _plain_lines(report: dict[str, Any]) -> list[str]:
    """What was done, without what was expected."""
    lines = [f"{'replica':>7}{'requests':>10}{'steps':>8}{'tokens':>9}{'in steps':>11}"]
    for row in report["replicas"]:
        counts = f"{row['replica']:>7}{row['requests']:>10}{row['steps']:>8}{row['tokens']:>9}"
        lines.append(f"{counts}{row['measured_s']:>9.2f} s")
    return lines


def _shown_audit(report: dict[str, Any]) -> list[str]:
    audit: list[str] = report["audit"]
    more = len(audit) - _SHOWN_AUDIT_LINES
    return audit[:_SHOWN_AUDIT_LINES] + ([f"... and {more} more idle ranks: see the report's file"] if more > 0 else [])


def _term_lines(report: dict[str, Any]) -> list[str]:
    """Predicted and measured seconds of each term: a pair of columns a replica, or one pair for many replicas."""
    columns = [row["terms"] for row in report["replicas"] if row["terms"]]
    heads = [f"replica {row['replica']}" for row in report["replicas"] if row["terms"]]
    if len(columns) > _SHOWN_REPLICAS:
        columns, heads = [[term for terms in columns for term in terms]], ["all replicas"]
    lines = [
        " " * 12 + "".join(f"{head:>22}" for head in heads),
        f"{'term':<12}"
        + f"{'predicted':>11}{'measured':>11}" * len(heads)
        + "   (whole steps measured, split as learned)",
    ]
    for name in TERMS:
        line = f"{name:<12}"
        for terms in columns:
            for key in ("predicted_s", "measured_s"):
                line += f"{sum(term[key] for term in terms if term['term'] == name):>9.2f} s"
        lines.append(line)
    return lines


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _errors_text(errors: dict[str, Any]) -> str:
    prior, learned = (
        f"{100 * errors[f'{kind}_median']:.0f} % (p95 {100 * errors[f'{kind}_p95']:.0f} %)"
        for kind in ("prior", "learned")
    )
    return f"prior {prior}, learned {learned}" + (", fell back to the prior" if errors["uses_prior"] else "")
