"""What rank 0 does and keeps for a thousand replicas, and over a long session: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.dispatcher import Dispatcher
from lepton_dist.coordinator.prior import typical_prior
from lepton_dist.coordinator.report import make_report
from lepton_dist.coordinator.reports import RanStep, StepReport, report_every_s, samples_a_report
from lepton_dist.engine.work import StepWork
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime import fitting as fitting_module
from lepton_dist.runtime import recorder as module
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.messages import Codec, Measured
from lepton_dist.runtime.recorder import Recorder
from tests.unit.coordinator.test_cost_model import SHAPE
from tests.unit.coordinator.test_oracles import BF16

REPLICAS = 1000
MODEL = Path(__file__).parents[3] / "configs" / "examples" / "tiny-stdlib"


def recorder(replicas: int, patch: pytest.MonkeyPatch, clock: Callable[[], float]) -> tuple[Recorder, CostModel]:
    plan = Plan(replicas=tuple(Replica((Stage((rank,)),)) for rank in range(replicas))).resolve(SHAPE, replicas)
    prior = typical_prior(("host",) * replicas, (0,) * replicas, (1,) * replicas)
    costs = CostModel(prior.cluster, plan, SHAPE, BF16)
    patch.setattr(module.time, "monotonic", clock)
    return Recorder(plan, ("host",) * replicas, costs, prior), costs


def test_reports_of_a_thousand_replicas_are_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REPLICAS / report_every_s(REPLICAS) <= 500
    assert report_every_s(1) == report_every_s(50) == 0.1
    steps = [RanStep(StepWork(64 + index, 64, 64, 64 * index), 0.01) for index in range(200)]
    report = StepReport.of(steps, samples_a_report(REPLICAS))
    assert report.num_steps == 200 and report.work.tokens == sum(64 + index for index in range(200))
    assert report.seconds == pytest.approx(2.0) and len(report.samples) == 1
    codec = Codec()
    encoded = codec.encode(Measured(3, [], report))
    assert len(encoded) < 200 and codec.decode(encoded) == Measured(3, [], report)
    now_s = 0.0
    made, costs = recorder(REPLICAS, monkeypatch, lambda: now_s)
    assert len({id(stage) for cost in costs.replicas for stage in cost.stages}) == 1, "like replicas share their prices"
    observed = []
    monkeypatch.setattr(costs, "observe", lambda *step: observed.append(step))
    dispatcher = Dispatcher([64] * REPLICAS)
    now_s = 2.0
    for replica in range(REPLICAS):
        dispatcher.ran(replica, [], report)
        made.ran(replica, 0, report)
    assert len(observed) == REPLICAS, "one step of 200 is looked at"
    replicas = make_report(made.record())["replicas"]
    assert sum(row["steps"] for row in replicas) == 200 * REPLICAS
    assert sum(row["tokens"] for row in replicas) == 200 * 64 * REPLICAS


def test_few_replicas_report_nearly_every_step() -> None:
    steps = [RanStep(StepWork(1, 1, 1), 0.01 * index) for index in range(40)]
    assert [step.seconds for step in StepReport.of(steps, 16).samples] == [0.01 * index for index in range(0, 40, 3)]
    assert StepReport.of(steps[:16], 16).samples == tuple(steps[:16])
    assert StepReport.of([], 16).num_steps == 0


def test_a_session_of_weeks_keeps_a_bounded_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pauses that leave gaps, so that nothing merges by itself; and steps of ever new widths."""
    now_s = 0.0
    monkeypatch.setattr(module, "_MOST_SPANS", 300)
    made, costs = recorder(1, monkeypatch, lambda: now_s)
    stage = costs.replicas[0].stages[0]
    for index in range(20_000):
        now_s += 2.0
        made.ran(0, 1, StepReport.of([RanStep(StepWork(index, index % 7 + 1, 1), 1.5)]))
    record = made.record()
    spans = record.replicas[0].spans
    assert 100 < len(spans) <= 301
    assert sum(span.num_steps for span in spans) == record.replicas[0].num_requests == 20_000
    assert sum(span.busy_s for span in spans) == pytest.approx(30_000)
    assert all(first.start_s + first.seconds <= second.start_s for first, second in pairwise(spans))
    assert sum(len(rank._products) for rank in stage._ranks) + len(stage._moves) <= 2 * 4096


def test_seats_of_one_shape_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits a thousand ranks is found from the few shapes that their seats have."""
    drawn = Blueprint.draw(str(MODEL), parse_plan("mesh: {dp: 512, pp: 2, tp: 1}"), 1024)
    dtypes = decide_dtypes(drawn.plan.precision, None, drawn.config.dtype)
    asked = []
    original = fitting_module.weight_bytes
    monkeypatch.setattr(fitting_module, "weight_bytes", lambda *of: asked.append(of) or original(*of))
    fitting = fitting_module.Fitting(drawn, dtypes)
    blocks = {fitting.blocks(seat, 1 << 30, "host") for seat in drawn.seats.values()}
    assert len(asked) == 2 and len(blocks) == 1
    for rank in (0, 1, 1023):
        assert fitting.weight_bytes(drawn.seats[rank]) == original(drawn.table, drawn.seats[rank], dtypes)
