"""Keeps what leaders report of their steps, in spans of about a second, and teaches the cost model with them."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import replace

from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.prior import Prior
from lepton_dist.coordinator.report import RankRecord, ReplicaRecord, RunRecord, Span
from lepton_dist.coordinator.reports import StepReport
from lepton_dist.coordinator.stage_cost import Terms
from lepton_dist.engine.work import StepWork
from lepton_dist.plan.plan import Plan

SPAN_S = 1.0
# Spans of all replicas together, and of one at least: the report shows its 120 columns of time. Beyond that, neighbours
# become one.
_MOST_SPANS, _FEWEST_SPANS = 50_000, 256


class _Track:
    """The steps of a replica: closed spans, `most_spans` of them at most, and the one that is being filled."""

    def __init__(self, most_spans: int) -> None:
        self.spans: list[Span] = []
        self.num_requests = self.num_steps = 0
        self.work = StepWork(0, 0, 0)
        self._most_spans, self._span_s = most_spans, SPAN_S
        self._end_s = 0.0
        self._open: Span | None = None

    def add(self, report: StepReport, predicted: Terms, now_s: float) -> None:
        """Steps that have come back until now."""
        self.num_steps += report.num_steps
        self.work = StepWork(*map(operator.add, self.work, report.work))
        start_s = max(now_s - report.seconds, self._end_s) if self._open is None else self._open.start_s
        self._end_s = now_s
        new = Span(start_s, now_s - start_s, report.seconds, report.num_steps, report.work.samples, predicted)
        self._open = new if self._open is None else _joined(self._open, new)
        if self._open.seconds >= self._span_s:
            self.close()

    def close(self) -> None:
        """End the present span."""
        if self._open is not None:
            self.spans.append(replace(self._open, busy_s=min(self._open.busy_s, self._open.seconds)))
            self._open = None
        if len(self.spans) > self._most_spans:
            pairs = zip(self.spans[::2], self.spans[1::2], strict=False)
            self.spans = [*(_joined(*pair) for pair in pairs), *self.spans[len(self.spans) // 2 * 2 :]]
            self._span_s *= 2


def _joined(first: Span, second: Span) -> Span:
    """One span from the begin of the first to the end of the second."""
    return Span(
        first.start_s,
        second.start_s + second.seconds - first.start_s,
        first.busy_s + second.busy_s,
        first.num_steps + second.num_steps,
        first.tokens + second.tokens,
        first.predicted.plus(second.predicted),
    )


class Recorder:
    """One a session; its clock starts with it. `hosts` are those of all ranks, spare ones included.

    `costs` are the plan's on the machines of `prior`; they learn from the steps.
    """

    def __init__(self, plan: Plan, hosts: Sequence[str], costs: CostModel, prior: Prior) -> None:
        self._start_s = time.monotonic()
        self._plan, self._hosts, self._costs, self._prior = plan, hosts, costs, prior
        most_spans = max(_FEWEST_SPANS, _MOST_SPANS // max(len(plan.replicas), 1))
        self._tracks = [_Track(most_spans) for _ in plan.replicas]

    def ran(self, replica: int, num_begun: int, report: StepReport) -> None:
        """A replica has just reported the requests that it has begun, and the steps that came back."""
        track, now_s = self._tracks[replica], time.monotonic() - self._start_s
        track.num_requests += num_begun
        if not report.num_steps:
            return
        predicted = Terms()
        for step in report.samples:
            predicted = predicted.plus(self._costs.replicas[replica].interval(step.work))
            if step.seconds > 0:
                self._costs.observe(replica, step.work, step.seconds)
        scale = report.num_steps / len(report.samples)
        track.add(report, Terms(*(scale * value for value in predicted)), now_s)

    def record(self) -> RunRecord:
        """The run so far."""
        for track in self._tracks:
            track.close()
        estimate = self._plan.estimate.get("tokens_per_s")
        return RunRecord(
            seconds=time.monotonic() - self._start_s,
            replicas=tuple(
                ReplicaRecord(
                    tuple(track.spans), track.num_requests, self._costs.errors(index), tuple(self._costs.table(index))
                )
                for index, track in enumerate(self._tracks)
            ),
            ranks=self._ranks(),
            prior=self._prior.source,
            is_prior_measured=self._prior.is_measured,
            predicted_tokens_per_s=float(estimate) if isinstance(estimate, int | float) else None,
        )

    def _ranks(self) -> tuple[RankRecord, ...]:
        records = [RankRecord(rank, host, None) for rank, host in enumerate(self._hosts)]
        for index, replica in enumerate(self._plan.replicas):
            for stage, shares in zip(replica.stages, self._shares(index), strict=True):
                for rank, share in zip(stage.ranks, shares, strict=True):
                    records[rank] = RankRecord(rank, self._hosts[rank], index, min(share, 1.0))
        return tuple(records)

    def _shares(self, replica: int) -> list[tuple[float, ...]]:
        """By stage, the part of a mean step in which each rank computes; all of it where no speed is known."""
        track = self._tracks[replica]
        if not self._prior.is_measured or not track.num_steps:
            return [(1.0,) * len(stage.ranks) for stage in self._plan.replicas[replica].stages]
        mean = StepWork(*(round(value / track.num_steps) for value in track.work))
        return self._costs.replicas[replica].rank_shares(mean)
