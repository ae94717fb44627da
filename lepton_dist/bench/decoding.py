"""The rate of decoding, from the steps that leaders report: nothing else of a run takes part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lepton_dist.coordinator.reports import RanStep, StepReport

_FEWEST_STEPS = 2


@dataclass
class DecodeSteps:
    """Takes reports of one run, of which the prompts come first; then tells the rate of its decode steps."""

    _steps: dict[int, list[RanStep]] = field(default_factory=dict)

    def heard(self, replica: int, report: StepReport) -> None:
        """A replica has reported some of its steps, in their order."""
        self._steps.setdefault(replica, []).extend(report.samples)

    def tokens_per_s(self) -> float | None:
        """Tokens of all replicas per second of decoding; None where too few steps were seen.

        Of each replica the steps count in which as many sequences as ever decode and nothing else runs, but for the
        first and the last of them: those wait for what comes before and after.
        """
        rates = [_rate(steps) for steps in self._steps.values() if steps]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if known and len(known) == len(rates) else None


def _rate(steps: Sequence[RanStep]) -> float | None:
    decoding = [step for step in steps if step.work.tokens == step.work.samples == step.work.sequences]
    most = max((step.work.samples for step in decoding), default=0)
    # A pipeline deals its sequences out over batches, of which some may be one shorter.
    full = [step for step in decoding if step.work.samples >= most - 1 and step.work.samples * 2 > most][1:-1]
    seconds = sum(step.seconds for step in full)
    if len(full) < _FEWEST_STEPS or seconds <= 0:
        return None
    return sum(step.work.samples for step in full) / seconds
