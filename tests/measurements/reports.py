"""What the reports of a thousand replicas cost rank 0, in cores: ``python -m tests.measurements.reports``.

Real leaders, driven by a clock of the program, report the steps of an engine that decodes. Timed is what rank 0 does
with as many such messages as a thousand leaders send in a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.dispatcher import Dispatcher
from lepton_dist.coordinator.prior import typical_prior
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Request
from lepton_dist.engine.runner import StepResult
from lepton_dist.plan.plan import EngineLimits, Plan, Replica, Stage
from lepton_dist.runtime import leader as module
from lepton_dist.runtime.leader import Leader
from lepton_dist.runtime.messages import Codec, Measured, Message
from lepton_dist.runtime.recorder import Recorder
from tests.unit.coordinator.test_cost_model import SHAPE
from tests.unit.coordinator.test_oracles import BF16

REPLICAS = 1000


@dataclass
class _Clock:
    now_s: float = 0.0

    def monotonic(self) -> float:
        return self.now_s


class _Step:
    def __init__(self, batch: RunBatch, clock: _Clock, step_s: float) -> None:
        self._batch, self._clock, self._step_s = batch, clock, step_s

    def result(self) -> StepResult:
        self._clock.now_s += self._step_s
        tokens = np.ones(len(self._batch.samples.rows) // 4, dtype=np.int32)
        return StepResult(self._batch.step, tokens.tobytes(), {}, [])


class _Runner:
    def __init__(self, clock: _Clock, step_s: float) -> None:
        self._clock, self._step_s = clock, step_s

    def expect(self, batch: RunBatch) -> None:
        """Nothing comes from a stage before."""

    def begin(self, batch: RunBatch) -> _Step:
        """A step that takes its time of the clock."""
        return _Step(batch, self._clock, self._step_s)


def reports(step_s: float, seconds: float = 8.0) -> list[bytes]:
    """What one leader of a thousand sends in so many seconds of steps of 16 sequences."""
    clock, codec, sent = _Clock(), Codec(), list[bytes]()

    def send(rank: int, message: Message) -> None:
        if isinstance(message, Measured):
            sent.append(codec.encode(message))

    def no_scanner(*_: object) -> None:
        raise ValueError("no request has stop strings")

    with patch.object(module, "time", clock):
        engine = Engine(EngineLimits(max_sequences=16), 16 * 900, 1, (), no_scanner)  # type: ignore[arg-type]
        runner = _Runner(clock, step_s)
        leader = Leader(0, REPLICAS, engine, runner, (), 60.0, send, str)  # type: ignore[arg-type]
        sampling = SamplingParams(max_tokens=10_000, temperature=0.0)
        leader.assign([Request(str(index), [1] * 100, sampling) for index in range(16)])
        while clock.now_s < seconds:
            leader.advance()
    return sent


def cores(step_s: float) -> float:
    """Processor seconds that rank 0 spends in a second on the reports of all replicas."""
    span_s = 8.0
    messages = reports(step_s, span_s)
    plan = Plan(replicas=tuple(Replica((Stage((rank,)),)) for rank in range(REPLICAS))).resolve(SHAPE, REPLICAS)
    prior = typical_prior(("host",) * REPLICAS, (0,) * REPLICAS, (1,) * REPLICAS)
    recorder = Recorder(plan, ("host",) * REPLICAS, CostModel(prior.cluster, plan, SHAPE, BF16), prior)
    dispatcher, codec = Dispatcher([64] * REPLICAS), Codec()
    taken = REPLICAS // 4  # replicas whose reports are timed
    start = time.thread_time()
    for message in messages:
        for replica in range(taken):
            decoded = codec.decode(message)
            assert isinstance(decoded, Measured)
            dispatcher.ran(replica, decoded.begun if replica == 0 else [], decoded.report)
            recorder.ran(replica, len(decoded.begun), decoded.report)
    return (time.thread_time() - start) * REPLICAS / taken / span_s


if __name__ == "__main__":
    for step_s in (0.01, 0.1):
        print(f"reports of {REPLICAS} replicas, steps of {1000 * step_s:g} ms: {cores(step_s):.3f} cores")
