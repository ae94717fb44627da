"""What replicas report of their steps: sums, and a few steps one by one; the more replicas, the less often. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lepton_dist.engine.work import StepWork

# Rank 0 has a shard of its own to compute: what it hears a second, and learns from, does not grow with the job.
_REPORTS_PER_S = 500
_SHORTEST_S = 0.1
_SAMPLES = 16  # of an interval, over all replicas


class RanStep(msgspec.Struct, frozen=True, array_like=True):
    """A step that came back: what it asked for, and the seconds since the one before."""

    work: StepWork
    seconds: float


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """Steps that a replica has run: how many, all their work and seconds together, and some of them, evenly taken."""

    num_steps: int
    work: StepWork
    seconds: float
    samples: tuple[RanStep, ...]

    @staticmethod
    def of(steps: Sequence[RanStep], most_samples: int = _SAMPLES) -> StepReport:
        """The report of these steps, with `most_samples` of them at most."""
        if not steps:
            return StepReport(0, StepWork(0, 0, 0), 0.0, ())
        work = StepWork(*map(sum, zip(*(step.work for step in steps), strict=True)))
        samples = tuple(steps[:: -(-len(steps) // most_samples)])
        return StepReport(len(steps), work, sum(step.seconds for step in steps), samples)


def report_every_s(num_replicas: int) -> float:
    """Seconds from one report of a replica to its next."""
    return max(_SHORTEST_S, num_replicas / _REPORTS_PER_S)


def samples_a_report(num_replicas: int) -> int:
    """Steps that a report tells one by one."""
    return max(1, _SAMPLES // num_replicas)
