"""The leader of a replica: keeps its stages busy, one command a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lepton_dist.coordinator.reports import RanStep, StepReport, report_every_s, samples_a_report
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Request
from lepton_dist.engine.runner import BegunStep, StageRunner, StepResult
from lepton_dist.errors import RankLostError
from lepton_dist.runtime.messages import Abandoned, CloseSession, Dropped, Finished, Measured, Message
from lepton_dist.telemetry.stopwatch import Stopwatch


class Leader:
    """Drives one replica from its first rank.

    `replica` is its number among `num_replicas`; `send` passes a message to a world rank; `describe_last` names the
    ranks whose result it waits for.
    """

    def __init__(
        self,
        replica: int,
        num_replicas: int,
        engine: Engine,
        runner: StageRunner,
        followers: tuple[int, ...],
        step_timeout_s: float,
        send: Callable[[int, Message], None],
        describe_last: Callable[[], str],
    ) -> None:
        self._replica = replica
        self._report_every_s, self._num_samples = report_every_s(num_replicas), samples_a_report(num_replicas)
        self._engine, self._runner, self._followers = engine, runner, followers
        self._step_timeout_s = step_timeout_s
        self._send, self._describe_last = send, describe_last
        self._begun: deque[BegunStep] = deque()
        self._last_progress_s = time.monotonic()
        self._since_progress = Stopwatch()  # for the deadline: a job that was suspended goes on
        self._is_closing = False
        self._steps: list[RanStep] = []
        self._busy_since_s: float | None = None
        self._reported_s = -self._report_every_s

    def assign(self, requests: list[Request]) -> None:
        """Queue requests."""
        for request in requests:
            self._engine.add(request)

    def drain(self) -> None:
        """Give back what has not begun."""
        self._send(0, Dropped(self._replica, self._engine.drop_waiting()))

    def take_back(self, keys: list[str]) -> None:
        """Give back those of these requests that have not begun."""
        self._send(0, Dropped(self._replica, self._engine.drop_waiting(set(keys))))

    def abandon(self) -> None:
        """Give up every request."""
        self._engine.abandon()
        self._send(0, Abandoned(self._replica))

    def close(self) -> None:
        """Start no more steps; followers are told when those in flight are back."""
        self._is_closing = True

    @property
    def is_closed(self) -> bool:
        """Whether it was told to close and no step is in flight."""
        return self._is_closing and self._engine.num_in_flight == 0

    def release(self) -> None:
        """Tell the followers that the session is over, behind the last step."""
        for rank in self._followers:
            self._send(rank, CloseSession())

    def advance(self) -> bool:
        """Start a step if the pipeline has room and there is work; False when there is nothing to do now.

        Raises:
            RankLostError: a step has not come back in time.
        """
        if self._engine.num_in_flight and self._since_progress.look() > self._step_timeout_s:
            raise RankLostError(
                f"while stepping: no result within {self._step_timeout_s:g} s from {self._describe_last()}"
            )
        batch = None
        if self._engine.has_work and self._engine.has_room and not self._is_closing:
            batch = self._engine.next_batch()
        if batch is None:
            return self._wait()
        if self._engine.num_in_flight == 1:
            self._last_progress_s = time.monotonic()
            self._since_progress.restart()
            if self._busy_since_s is None:
                self._busy_since_s = self._last_progress_s
        self._run(batch)
        return True

    def _wait(self) -> bool:
        """With nothing to start, take in the oldest step that was begun here; False when there is none."""
        if self._begun:
            self.take(self._begun.popleft().result())
            return True
        if not self._engine.has_work:
            self._busy_since_s = None
            self._report()
        return False

    def take(self, result: StepResult) -> None:
        """A step came back: report the requests that it finished."""
        now_s = time.monotonic()
        since_s = self._last_progress_s if self._busy_since_s is None else self._busy_since_s
        self._steps.append(RanStep(self._engine.counts(result.step), now_s - since_s))
        self._last_progress_s = self._busy_since_s = now_s
        self._since_progress.restart()
        finished = self._engine.apply(result)
        while self._begun and not self._engine.has_work:  # what ran ahead of the end
            self._engine.apply(self._begun.popleft().result())
        # Before the last request is reported: rank 0 may be done with it.
        self._report(is_last=not self._engine.has_work)
        for key, output in finished:
            self._send(0, Finished(key, output))

    def _report(self, *, is_last: bool = False) -> None:
        """Tell rank 0 what has begun and come back, but not at every step."""
        now_s = time.monotonic()
        if not self._steps or (now_s - self._reported_s < self._report_every_s and not is_last):
            return
        report = StepReport.of(self._steps, self._num_samples)
        self._send(0, Measured(self._replica, self._engine.take_begun(), report))
        self._steps = []
        self._reported_s = now_s

    def _run(self, batch: RunBatch) -> None:
        for rank in self._followers:
            self._send(rank, batch)
        self._runner.expect(batch)
        begun = self._runner.begin(batch)
        if begun is not None:
            self._begun.append(begun)
        if not self._engine.has_room:
            self._wait()
