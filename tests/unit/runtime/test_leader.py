"""What a leader tells rank 0 of its steps, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Request
from lepton_dist.engine.runner import StepResult
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.runtime import leader as module
from lepton_dist.runtime.leader import Leader
from lepton_dist.runtime.messages import Codec, Dropped, Finished, Measured, Message

END = 9


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Step:
    """A step that was begun: its result takes `seconds` of the clock."""

    def __init__(self, batch: RunBatch, runner: Runner) -> None:
        self._batch, self._runner = batch, runner

    def result(self) -> StepResult:
        self._runner.clock.now_s += self._runner.seconds
        self._runner.log.append(f"took in {self._batch.step}")
        tokens = np.full(len(self._batch.samples.rows) // 4, self._runner.token, dtype=np.int32)
        return StepResult(self._batch.step, tokens.tobytes(), {}, [])


class Runner:
    def __init__(self, clock: Clock) -> None:
        self.clock, self.seconds, self.token = clock, 0.02, 5
        self.log: list[str] = []

    def expect(self, batch: RunBatch) -> None: ...

    def begin(self, batch: RunBatch) -> Step:
        self.log.append(f"began {batch.step}")
        return Step(batch, self)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Leader, list[Message], Clock, Runner]:
    return make(monkeypatch)


def make(
    monkeypatch: pytest.MonkeyPatch, ahead: int = 0, num_replicas: int = 1
) -> tuple[Leader, list[Message], Clock, Runner]:
    clock, sent = Clock(), []
    runner = Runner(clock)
    monkeypatch.setattr(module, "time", clock)
    limits = EngineLimits(block_tokens=4, max_batch_tokens=32, max_sequences=2)
    engine = Engine(limits, 64, 1, (END,), lambda stops, preceding: pytest.fail("no stop strings here"), ahead=ahead)
    send: Callable[[int, Message], None] = lambda rank, message: sent.append(message)  # noqa: E731
    return Leader(3, num_replicas, engine, runner, (), 60.0, send, lambda: "nobody"), sent, clock, runner  # type: ignore[arg-type]


def request(key: str, tokens: int = 8) -> Request:
    return Request(key, [1, 2, 3], SamplingParams(max_tokens=tokens, temperature=0.0, seed=0))


def rows(messages: list[Message]) -> list[list[float]]:
    """Every step that was reported, which tells all of them while they are few."""
    reports = [message.report for message in messages if isinstance(message, Measured)]
    assert all(report.num_steps == len(report.samples) for report in reports)
    return [[*step.work, step.seconds] for report in reports for step in report.samples]


def test_steps_are_reported_in_batches(made: tuple[Leader, list[Message], Clock, Runner]) -> None:
    leader, sent, clock, _ = made
    leader.assign([request("a"), request("b"), request("c")])
    while leader.advance():
        clock.now_s += 0.005  # what the rank does between its steps belongs to them
    clock.now_s += 1.0
    leader.advance()
    reports = [message for message in sent if isinstance(message, Measured)]
    steps = rows(sent)
    assert len(steps) == 16 and len(reports) < 8  # 8 for a and b together, 8 for c
    assert [key for report in reports for key in report.begun] == ["a", "b", "c"]
    assert all(report.replica == 3 for report in reports)
    assert steps[0][:5] == [6, 2, 2, 0, 12]
    assert steps[1][:5] == [2, 2, 2, 8, 0]
    assert [step[5] for step in steps] == pytest.approx([0.02] + [0.025] * 15)
    assert [message.key for message in sent if isinstance(message, Finished)] == ["a", "b", "c"]
    decoded = Codec().decode(Codec().encode(reports[0]))
    assert decoded == reports[0]


def test_idle_time_is_no_step(made: tuple[Leader, list[Message], Clock, Runner]) -> None:
    leader, sent, clock, _ = made
    for key in "ab":
        leader.assign([request(key, tokens=1)])
        while leader.advance():
            pass
        clock.now_s += 5.0
        leader.advance()
    assert [row[5] for row in rows(sent)] == pytest.approx([0.02, 0.02])


def test_only_what_has_not_begun_is_given_back(made: tuple[Leader, list[Message], Clock, Runner]) -> None:
    leader, sent, _, _ = made
    leader.assign([request(key) for key in "abcd"])
    leader.advance()
    leader.take_back(["a", "d", "gone"])
    assert sent[-1] == Dropped(3, ["d"])
    leader.take_back(["a"])
    assert sent[-1] == Dropped(3, [])
    while leader.advance():
        pass
    assert [message.key for message in sent if isinstance(message, Finished)] == ["a", "b", "c"]


def test_with_a_gpu_the_next_step_is_ordered_before_the_last_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, sent, _, runner = make(monkeypatch, ahead=1)
    leader.assign([request("a", tokens=4)])
    while leader.advance():
        pass
    # The fourth token is the last for certain: nothing runs ahead of it.
    expected = ["began 0", "began 1", "took in 0", "began 2", "took in 1", "began 3", "took in 2", "took in 3"]
    assert runner.log == expected
    assert [message.key for message in sent if isinstance(message, Finished)] == ["a"]
    assert [step[0] for step in rows(sent)] == [3, 1, 1, 1]


def test_what_ran_ahead_of_an_end_is_in_no_report_and_over_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, sent, _, runner = make(monkeypatch, ahead=1)
    runner.token = END
    leader.assign([request("a", tokens=4)])
    while leader.advance():
        pass
    assert runner.log == ["began 0", "began 1", "took in 0", "took in 1"]
    finished = [message for message in sent if isinstance(message, Finished)]
    assert finished[0].output.completions[0].token_ids == [END]
    assert isinstance(sent[-1], Finished) and len(rows(sent)) == 1
    leader.close()
    assert leader.is_closed
