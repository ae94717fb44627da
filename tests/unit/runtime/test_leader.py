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


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


class Runner:
    """Every step takes `seconds` of the clock."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = 0.02

    def expect(self, batch: RunBatch) -> None: ...

    def run(self, batch: RunBatch) -> StepResult:
        self._clock.now_s += self.seconds
        tokens = np.full(len(batch.samples.rows) // 4, 5, dtype=np.int32)
        return StepResult(batch.step, tokens.tobytes(), {}, [])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[Leader, list[Message], Clock, Runner]:
    clock, sent = Clock(), []
    runner = Runner(clock)
    monkeypatch.setattr(module, "time", clock)
    limits = EngineLimits(block_tokens=4, max_batch_tokens=32, max_sequences=2)
    engine = Engine(limits, 64, 1, (9,), lambda stops: pytest.fail("no stop strings here"))
    send: Callable[[int, Message], None] = lambda rank, message: sent.append(message)  # noqa: E731
    return Leader(3, engine, runner, (), 1, 60.0, send, lambda: "nobody"), sent, clock, runner  # type: ignore[arg-type]


def request(key: str, tokens: int = 8) -> Request:
    return Request(key, [1, 2, 3], SamplingParams(max_tokens=tokens, temperature=0.0, seed=0))


def rows(messages: list[Message]) -> list[list[float]]:
    return [row for m in messages if isinstance(m, Measured) for row in np.frombuffer(m.steps).reshape(-1, 6).tolist()]


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
