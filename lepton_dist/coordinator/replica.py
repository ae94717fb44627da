"""A simulated replica: the real scheduler, with the cost model as the clock of its stages. Pure."""

from __future__ import annotations

from lepton_dist.coordinator.cost_model import ReplicaCost
from lepton_dist.coordinator.events import Result
from lepton_dist.coordinator.reports import RanStep
from lepton_dist.coordinator.timeline import Lane
from lepton_dist.engine.kv_blocks import KvBlocks
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.scheduler import Chunk, Scheduler
from lepton_dist.engine.work import StepWork, count_work
from lepton_dist.plan.plan import EngineLimits


class SimulatedReplica:
    """Starts batches while its stages have room, and takes them back.

    Where nothing arrives, ends or runs out of blocks for some steps, they are taken in one jump: the scheduler would
    decide the same every time. What arrives meanwhile cuts the jump at the next step (`cut`).
    """

    def __init__(self, index: int, cost: ReplicaCost, limits: EngineLimits, num_blocks: int, *, jumps: bool) -> None:
        self.index, self._cost, self._limits = index, cost, limits
        self.reach_s = cost.reach_s
        self.lanes = [Lane() for _ in cost.stages]
        self.blocks = KvBlocks(num_blocks, limits.block_tokens, has_prefix_cache=False)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_tokens=limits.batch_tokens(len(cost.stages)),
            max_sequences=limits.max_sequences,
            num_stages=len(cost.stages),
        )
        self._jumps = jumps and len(cost.stages) == 1
        self._running: dict[Sequence, int] = {}  # tokens to draw until the end
        self._outputs: dict[str, int] = {}
        self._free_s = [0.0] * len(cost.stages)
        self._num_in_flight = self._num_arrivals = 0
        self._version = 0
        self._jump: tuple[float, Result] | None = None
        self._last_result_s = 0.0
        self.begun: list[str] = []
        self.steps: list[RanStep] = []

    def add(self, request: Request, output_tokens: int) -> None:
        """Queue a request."""
        self._outputs[request.key] = output_tokens
        self.scheduler.add(Sequence(request, 0, self._num_arrivals))
        self._num_arrivals += 1

    def give_back(self, keys: list[str]) -> list[str]:
        """Those of these requests that have not begun; they are gone from here."""
        dropped = [sequence.request.key for sequence in self.scheduler.drop_waiting(set(keys))]
        for key in dropped:
            del self._outputs[key]
        return dropped

    def start(self, now_s: float) -> tuple[float, Result] | None:
        """The next batch and when it will be back; None when there is no room or no work."""
        if self._num_in_flight >= len(self._free_s):
            return None
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        for chunk in chunks:
            if chunk.sequence not in self._running:
                key = chunk.sequence.request.key
                self._running[chunk.sequence] = self._outputs.pop(key)
                self.begun.append(key)
        if self._num_in_flight == 0:
            self._last_result_s = max(self._last_result_s, now_s)
        self._num_in_flight += 1
        work = count_work(chunks)
        num_steps = self._steps_alike(chunks) if self._jumps else 1
        if num_steps > 1:
            # Attention grows by a token a sequence and step: the middle step costs the mean.
            middle = work.decode_kv_tokens + work.sequences * (num_steps - 1) // 2
            work = work._replace(decode_kv_tokens=middle)
        end_s, step_s = self._run(now_s, work, num_steps)
        self._version += 1
        result = Result(self.index, chunks, num_steps, step_s, self._version)
        if num_steps > 1:
            self._jump = now_s, result
        return end_s, result

    def cut(self, now_s: float) -> tuple[float, Result] | None:
        """Shorten a jump to the step that runs now, for what has arrived; the new end, or None when nothing changes."""
        if self._jump is None or self.scheduler.num_running >= self._limits.max_sequences:
            return None
        start_s, result = self._jump
        num_steps = min(int((now_s - start_s) / result.step_s) + 1, result.num_steps)
        self._jump = None
        if num_steps == result.num_steps:
            return None
        self._version += 1
        end_s = start_s + num_steps * result.step_s
        self.lanes[0].shorten(end_s)
        self._free_s[0] = end_s
        return end_s, Result(self.index, result.chunks, num_steps, result.step_s, self._version)

    def is_current(self, result: Result) -> bool:
        """Whether a result is the one that will come, and not one that was cut short."""
        return len(self._free_s) > 1 or result.version == self._version

    def take(self, now_s: float, result: Result) -> list[tuple[Sequence, bool]]:
        """A batch is back: sequences that drew their first token, and those (True) that ended."""
        self._jump = None
        self._num_in_flight -= 1
        self.scheduler.returned(result.chunks)
        seconds = (now_s - self._last_result_s) / result.num_steps
        self._last_result_s = now_s
        ran = RanStep(count_work(result.chunks), seconds)
        self.steps += [ran] * result.num_steps
        events = []
        more = result.num_steps - 1
        for chunk in result.chunks:
            if not chunk.samples:
                continue
            sequence = chunk.sequence
            if len(sequence.tokens) == sequence.prompt_length:
                events.append((sequence, False))
            left = self._running[sequence] - result.num_steps
            sequence.tokens += [0] * result.num_steps
            if left <= 0:
                self.scheduler.finish(sequence)
                del self._running[sequence]
                events.append((sequence, True))
                continue
            self._running[sequence] = left
            if more:
                sequence.num_computed += more
                if not self.blocks.extend(sequence, sequence.num_computed):
                    raise ValueError("a jump ran out of KV blocks")  # `_steps_alike` looked
        return events

    def _steps_alike(self, chunks: list[Chunk]) -> int:
        """Steps from here on that decode the same sequences, one token each."""
        if len(chunks) != self.scheduler.num_running:
            return 1
        if self.scheduler.num_waiting and len(chunks) < self._limits.max_sequences:
            return 1
        if any(chunk.count != 1 or not chunk.samples for chunk in chunks):
            return 1
        steps = min(self._running[chunk.sequence] for chunk in chunks)
        room = self.blocks.num_free // len(chunks) * self.blocks.block_tokens
        return max(1, min(steps, room))

    def _run(self, now_s: float, work: StepWork, num_steps: int) -> tuple[float, float]:
        """When the batch is back, and the seconds of a step."""
        if len(self._free_s) == 1:
            step_s = self._cost.step_s(work)
            end_s = now_s + num_steps * step_s
            self.lanes[0].add(now_s, end_s, work.tokens * num_steps, num_steps)
            return end_s, step_s
        time_s, last = now_s, len(self._free_s) - 1
        for stage, cost in enumerate(self._cost.stages):
            start_s = max(time_s, self._free_s[stage])
            time_s = start_s + cost.terms(work).total
            self._free_s[stage] = time_s
            self.lanes[stage].add(start_s, time_s, work.tokens if stage < last else work.samples, 1)
        return time_s, time_s - now_s
