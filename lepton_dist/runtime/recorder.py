"""Keeps what leaders report of their steps, in spans of about a second, and teaches the cost model with them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.dispatcher import RanStep
from lepton_dist.coordinator.prior import Prior
from lepton_dist.coordinator.report import RankRecord, ReplicaRecord, RunRecord, Span
from lepton_dist.coordinator.stage_cost import Terms
from lepton_dist.engine.work import StepWork
from lepton_dist.plan.plan import Plan

SPAN_S = 1.0
# Steps a report from which the cost model learns, over all replicas: rank 0 has a shard of its own to compute.
_LEARNED_STEPS = 16


@dataclass
class _Track:
    """The steps of a replica: closed spans, and the one that is being filled."""

    spans: list[Span] = field(default_factory=list)
    num_requests: int = 0
    start_s: float = 0.0
    end_s: float = 0.0
    busy_s: float = 0.0
    num_steps: int = 0
    tokens: int = 0
    predicted: Terms = field(default_factory=Terms)
    work: StepWork = field(default_factory=lambda: StepWork(0, 0, 0))  # of all steps
    num_works: int = 0

    def add(self, steps: Sequence[RanStep], predicted: Sequence[Terms], now_s: float) -> None:
        """Steps that have come back until now."""
        busy_s = sum(step.seconds for step in steps)
        if not self.num_steps:
            self.start_s = max(now_s - busy_s, self.end_s)
        self.end_s = now_s
        self.busy_s += busy_s
        self.num_steps += len(steps)
        self.tokens += sum(step.work.samples for step in steps)
        self.predicted = Terms(*map(sum, zip(self.predicted, *predicted, strict=True)))
        self.work = StepWork(*map(sum, zip(self.work, *(step.work for step in steps), strict=True)))
        self.num_works += len(steps)
        if now_s - self.start_s >= SPAN_S:
            self.close()

    def close(self) -> None:
        """End the present span."""
        if self.num_steps:
            seconds = self.end_s - self.start_s
            busy_s = min(self.busy_s, seconds)
            self.spans.append(Span(self.start_s, seconds, busy_s, self.num_steps, self.tokens, self.predicted))
        self.busy_s, self.num_steps, self.tokens, self.predicted = 0.0, 0, 0, Terms()


class Recorder:
    """One a session; its clock starts with it. `hosts` are those of all ranks, spare ones included.

    `costs` are the plan's on the machines of `prior`; they learn from the steps.
    """

    def __init__(self, plan: Plan, hosts: Sequence[str], costs: CostModel, prior: Prior) -> None:
        self._start_s = time.monotonic()
        self._plan, self._hosts, self._costs, self._prior = plan, hosts, costs, prior
        self._tracks = [_Track() for _ in plan.replicas]
        self._num_learned = max(1, _LEARNED_STEPS // max(len(plan.replicas), 1))

    def ran(self, replica: int, num_begun: int, steps: Sequence[RanStep]) -> None:
        """A replica has just reported the requests that it has begun, and the steps that came back."""
        track, now_s = self._tracks[replica], time.monotonic() - self._start_s
        track.num_requests += num_begun
        if not steps:
            return
        cost = self._costs.replicas[replica]
        track.add(steps, [cost.interval(step.work) for step in steps], now_s)
        for step in steps[: self._num_learned]:
            if step.seconds > 0:
                self._costs.observe(replica, step.work, step.seconds)

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
        if not self._prior.is_measured or not track.num_works:
            return [(1.0,) * len(stage.ranks) for stage in self._plan.replicas[replica].stages]
        mean = StepWork(*(round(value / track.num_works) for value in track.work))
        return self._costs.replicas[replica].rank_shares(mean)
