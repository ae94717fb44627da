"""Keeps what leaders report of their steps, in spans of about a second, for the run's report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lepton_dist.coordinator.dispatcher import RanStep
from lepton_dist.coordinator.report import RankRecord, ReplicaRecord, RunRecord, Span
from lepton_dist.coordinator.stage_cost import Terms
from lepton_dist.plan.plan import Plan

SPAN_S = 1.0


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

    def add(self, steps: Sequence[RanStep], now_s: float) -> None:
        """Steps that have come back until now."""
        busy_s = sum(step.seconds for step in steps)
        if not self.num_steps:
            self.start_s = max(now_s - busy_s, self.end_s)
        self.end_s = now_s
        self.busy_s += busy_s
        self.num_steps += len(steps)
        self.tokens += sum(step.samples for step in steps)
        if now_s - self.start_s >= SPAN_S:
            self.close()

    def close(self) -> None:
        """End the present span."""
        if self.num_steps:
            seconds = self.end_s - self.start_s
            busy_s = min(self.busy_s, seconds)
            self.spans.append(Span(self.start_s, seconds, busy_s, self.num_steps, self.tokens, Terms()))
        self.busy_s, self.num_steps, self.tokens = 0.0, 0, 0


class Recorder:
    """One a session; its clock starts with it. `hosts` are those of all ranks, spare ones included."""

    def __init__(self, plan: Plan, hosts: Sequence[str]) -> None:
        self._start_s = time.monotonic()
        self._plan, self._hosts = plan, hosts
        self._tracks = [_Track() for _ in plan.replicas]

    def ran(self, replica: int, num_begun: int, steps: Sequence[RanStep]) -> None:
        """A replica has just reported the requests that it has begun, and the steps that came back."""
        track, now_s = self._tracks[replica], time.monotonic() - self._start_s
        track.num_requests += num_begun
        if steps:
            track.add(steps, now_s)

    def record(self) -> RunRecord:
        """The run so far."""
        for track in self._tracks:
            track.close()
        replica_of = {rank: index for index, replica in enumerate(self._plan.replicas) for rank in replica.ranks}
        estimate = self._plan.estimate.get("tokens_per_s")
        return RunRecord(
            seconds=time.monotonic() - self._start_s,
            replicas=tuple(ReplicaRecord(tuple(track.spans), track.num_requests) for track in self._tracks),
            ranks=tuple(RankRecord(rank, host, replica_of.get(rank)) for rank, host in enumerate(self._hosts)),
            predicted_tokens_per_s=float(estimate) if isinstance(estimate, int | float) else None,
        )
