"""What leaders report becomes spans that do not overlap, with every step and token in them."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lepton_dist.coordinator.dispatcher import RanStep
from lepton_dist.coordinator.report import make_report, report_text
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.runtime import recorder as module
from lepton_dist.runtime.recorder import Recorder

PLAN = Plan(replicas=(Replica((Stage((0,)),)), Replica((Stage((1,)),))), estimate={"tokens_per_s": 5})


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.0, 3.0), st.floats(0.0, 1.0), st.integers(1, 4)), max_size=40))
def test_spans_hold_every_step_and_do_not_overlap(reports: list[tuple[int, float, float, int]]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", clock.monotonic)
        recorder = Recorder(PLAN, ("a", "b", "c"))
        for replica, pause_s, part, count in reports:
            clock.now_s += pause_s
            recorder.ran(replica, 1, [RanStep(3, 2, 2, pause_s * part / count)] * count)
        record = recorder.record()
    for index, replica in enumerate(record.replicas):
        mine = [report for report in reports if report[0] == index]
        assert sum(span.num_steps for span in replica.spans) == sum(report[3] for report in mine)
        assert sum(span.tokens for span in replica.spans) == 2 * sum(report[3] for report in mine)
        assert replica.num_requests == len(mine)
        busy_s = sum(report[1] * report[2] for report in mine)
        assert sum(span.busy_s for span in replica.spans) == pytest.approx(busy_s, abs=1e-6)
        ends = [0.0, *(span.start_s + span.seconds for span in replica.spans)]
        assert all(span.start_s >= end - 1e-9 for span, end in zip(replica.spans, ends[:-1], strict=True))
        assert ends[-1] <= record.seconds + 1e-9


def test_a_report_without_predictions_shows_none() -> None:
    recorder = Recorder(PLAN, ("a", "b", "c"))
    recorder.ran(0, 1, [RanStep(3, 2, 2, 0.0)])
    report = make_report(recorder.record())
    assert report["predicted_tokens_per_s"] == 5 and report["replicas"][0]["predicted_s"] is None
    text = report_text(report)
    assert "term" not in text and "rank 2 on c was idle for the whole run: the plan leaves it out" in text
