"""What leaders report becomes spans that do not overlap, with every step and token in them, and teaches the model."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.prior import Prior, measured_prior, typical_prior
from lepton_dist.coordinator.report import make_report, report_text
from lepton_dist.coordinator.reports import RanStep, StepReport
from lepton_dist.engine.work import StepWork
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.runtime import recorder as module
from lepton_dist.runtime.recorder import Recorder
from tests.unit.coordinator.test_cost_model import DECODE, SHAPE, cluster, model, slowed

HOSTS = ("a", "b", "c")
TYPICAL = typical_prior(HOSTS, (0, 0, 0), (1, 2, 1))


def resolved(*groups: tuple[int, ...]) -> Plan:
    return Plan(replicas=tuple(Replica((Stage(ranks),)) for ranks in groups), estimate={"tokens_per_s": 5}).resolve(
        SHAPE, 3
    )


PLAN = resolved((0,), (1,))


def recorder(plan: Plan = PLAN, prior: Prior = TYPICAL) -> Recorder:
    return Recorder(plan, HOSTS, model(plan, prior.cluster), prior)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.0, 3.0), st.floats(0.0, 1.0), st.integers(1, 4)), max_size=40))
def test_spans_hold_every_step_and_do_not_overlap(reports: list[tuple[int, float, float, int]]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", clock.monotonic)
        made = recorder()
        for replica, pause_s, part, count in reports:
            clock.now_s += pause_s
            made.ran(replica, 1, StepReport.of([RanStep(StepWork(3, 2, 2, 50), pause_s * part / count)] * count))
        record = made.record()
    for index, replica in enumerate(record.replicas):
        mine = [report for report in reports if report[0] == index]
        num_steps = sum(report[3] for report in mine)
        assert sum(span.num_steps for span in replica.spans) == num_steps
        assert sum(span.tokens for span in replica.spans) == 2 * num_steps
        step_s = model(PLAN, TYPICAL.cluster).replicas[index].step_s(StepWork(3, 2, 2, 50))
        assert sum(span.predicted.total for span in replica.spans) == pytest.approx(num_steps * step_s)
        assert replica.num_requests == len(mine)
        busy_s = sum(report[1] * report[2] for report in mine)
        assert sum(span.busy_s for span in replica.spans) == pytest.approx(busy_s, abs=1e-6)
        ends = [0.0, *(span.start_s + span.seconds for span in replica.spans)]
        assert all(span.start_s >= end - 1e-9 for span, end in zip(replica.spans, ends[:-1], strict=True))
        assert ends[-1] <= record.seconds + 1e-9


def report_of(machines: Cluster, factor: float, count: int = 40) -> dict:
    """Both ranks of a pair, whose steps take `factor` times as long as predicted."""
    plan = resolved((0, 1))
    prior = measured_prior(machines)
    made = recorder(plan, prior)
    step_s = model(plan, machines).replicas[0].step_s(DECODE)
    for _ in range(count):
        made.ran(0, 1, StepReport.of([RanStep(DECODE, factor * step_s)]))
    return make_report(made.record())


def test_the_model_learns_and_tells_its_error() -> None:
    row = report_of(cluster(0, 0, 0), 3.0)["replicas"][0]
    assert row["errors"]["num_steps"] == 40 and not row["errors"]["uses_prior"]
    assert row["errors"]["prior_median"] == pytest.approx(2 / 3)
    assert row["errors"]["learned_median"] < 0.2
    assert row["predicted_s"] == pytest.approx(sum(term["predicted_s"] for term in row["terms"]))
    exact = report_of(cluster(0, 0, 0), 1.0)["replicas"][0]
    assert exact["errors"]["uses_prior"] and exact["errors"]["prior_median"] == pytest.approx(0)


def test_the_prior_is_told_and_ranks_wait_only_where_it_is_measured() -> None:
    machines = slowed(cluster(0, 0, 0), 1, 3.0)
    report = report_of(machines, 1.0)
    assert report["prior"] == "the cluster 'c'"
    steps = model(resolved((0, 1)), machines).replicas[0].rank_shares(DECODE)[0]
    assert steps[0] < 0.6 < steps[1]
    made = recorder()
    made.ran(0, 1, StepReport.of([RanStep(DECODE, 0.0)]))
    record = made.record()
    assert "no `cluster`" in record.prior and [rank.share for rank in record.ranks] == [1.0, 1.0, 1.0]
    waiting = Recorder(resolved((0, 1)), HOSTS, model(resolved((0, 1)), machines), measured_prior(machines))
    waiting.ran(0, 1, StepReport.of([RanStep(DECODE, 0.1)]))
    assert [rank.share for rank in waiting.record().ranks] == pytest.approx([*steps, 1.0])
    assert "rank 2 on c was idle for the whole run: the plan leaves it out" in report_text(make_report(record))


def test_typical_machines_have_the_layout_of_the_job() -> None:
    assert TYPICAL.cluster.nodes == (0, 0, 0)
    one, two, _ = TYPICAL.cluster.ranks
    assert two.memory_bytes_per_s == 2 * one.memory_bytes_per_s
    TYPICAL.cluster.check([5, 5, 5])
