"""The rate of decoding: which steps of a run count."""

from __future__ import annotations

import pytest

from lepton_dist.bench.decoding import DecodeSteps
from lepton_dist.coordinator.reports import RanStep, StepReport
from lepton_dist.engine.work import StepWork


def decode(count: int, seconds: float) -> RanStep:
    return RanStep(StepWork(count, count, count, 100 * count), seconds)


PROMPT = RanStep(StepWork(512, 1, 1, 0, 512 * 513 // 2), 5.0)
MIXED = RanStep(StepWork(256, 5, 5, 400, 252 * 256), 5.0)


def rate(*replicas: list[RanStep]) -> float | None:
    steps = DecodeSteps()
    for replica, ran in enumerate(replicas):
        for start in range(0, len(ran), 3):
            steps.heard(replica, StepReport.of(ran[start : start + 3]))
    return steps.tokens_per_s()


def test_only_full_decode_steps_count_without_the_first_and_the_last() -> None:
    steps = [
        PROMPT,
        MIXED,
        decode(3, 9.0),
        decode(8, 9.0),
        decode(8, 0.1),
        decode(8, 0.3),
        decode(8, 9.0),
        decode(2, 9),
    ]
    assert rate(steps) == pytest.approx(16 / 0.4)


def test_a_pipeline_deals_its_sequences_out_over_batches() -> None:
    steps = [PROMPT, decode(5, 9.0), *[decode(4, 0.1), decode(5, 0.2)] * 4, decode(4, 9.0)]
    assert rate(steps) == pytest.approx(36 / 1.2)


def test_replicas_decode_beside_each_other() -> None:
    steps = [PROMPT, *[decode(4, 0.1)] * 5]
    assert rate(steps, steps) == pytest.approx(80.0)


def test_too_few_steps_are_no_figure() -> None:
    for steps in ([], [PROMPT, MIXED], [PROMPT, decode(1, 0.1), decode(1, 0.1), decode(1, 0.1)]):
        assert rate(steps) is None
    enough = [PROMPT, *[decode(4, 0.1)] * 5]
    assert rate(enough, [PROMPT, decode(4, 0.1)]) is None
