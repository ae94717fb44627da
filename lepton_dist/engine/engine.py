"""The leader's view of a replica: requests in, batches out, results in, finished requests out. No MPI, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from heapq import heappop, heappush

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch, make_batch, read_int32
from lepton_dist.engine.kv_blocks import KvBlocks
from lepton_dist.engine.request import Request, Scanner, Sequence
from lepton_dist.engine.runner import StepResult
from lepton_dist.engine.scheduler import Chunk, Scheduler
from lepton_dist.engine.work import StepWork, count_work
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.text.completion import Completion, RequestOutput, TokenLogprob


@dataclass
class _Progress:
    """A request on its way: its samples still running, and those done."""

    request: Request
    sequences: list[Sequence]
    done: dict[int, Completion] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)


class Engine:
    """One replica's scheduler and the state of its requests.

    Batches in flight: one a stage, and `ahead` more, for a stage that draws a token and goes on with it by itself.
    """

    def __init__(
        self,
        limits: EngineLimits,
        num_blocks: int,
        num_stages: int,
        eos_token_ids: tuple[int, ...],
        make_scanner: Callable[[tuple[str, ...], list[int]], Scanner],
        long_after: int | None = None,
        ahead: int = 0,
    ) -> None:
        blocks = KvBlocks(num_blocks, limits.block_tokens, has_prefix_cache=limits.prefix_cache)
        self.scheduler = Scheduler(
            blocks,
            max_batch_tokens=limits.batch_tokens(num_stages),
            max_sequences=limits.max_sequences,
            num_stages=num_stages,
            ahead=ahead,
        )
        self._most_in_flight = num_stages + ahead
        self._eos = frozenset(eos_token_ids)
        self._make_scanner, self._long_after = make_scanner, long_after
        self._progress: dict[str, _Progress] = {}
        self._in_flight: dict[int, list[Chunk]] = {}
        self._num_steps = self._num_arrivals = 0
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._fresh: set[str] = set()
        self._begun: list[str] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return self.scheduler.has_work

    @property
    def num_in_flight(self) -> int:
        """Batches whose result has not come back."""
        return len(self._in_flight)

    @property
    def has_room(self) -> bool:
        """Whether one more batch may be in flight."""
        return len(self._in_flight) < self._most_in_flight

    def add(self, request: Request) -> None:
        """Queue a request; it must fit the cache."""
        stops = request.sampling.stop
        samples = range(request.sampling.n)
        is_long = self._long_after is not None and len(request.prompt) > self._long_after
        sequences = [Sequence(request, sample, self._num_arrivals + sample, is_long) for sample in samples]
        if stops:
            for sequence in sequences:
                sequence.scanner = self._make_scanner(stops, request.preceding)
        self._progress[request.key] = _Progress(request, sequences)
        self._fresh.add(request.key)
        self._num_arrivals += len(sequences)
        for sequence in sequences:
            self.scheduler.add(sequence)

    def drop_waiting(self, keys: Container[str] | None = None) -> list[str]:
        """Give up the requests, of these or of all, of which no sample has begun; returns their keys."""
        dropped = self.scheduler.drop_waiting(keys)
        counts: dict[str, int] = {}
        for sequence in dropped:
            counts[sequence.request.key] = counts.get(sequence.request.key, 0) + 1
        whole = {key for key, count in counts.items() if count == self._progress[key].request.sampling.n}
        for sequence in dropped:
            if sequence.request.key not in whole:
                self.scheduler.add(sequence)
        for key in whole:
            del self._progress[key]
        self._fresh -= whole
        return sorted(whole)

    def abandon(self) -> None:
        """Give up every request; what is in flight comes back to nobody."""
        for progress in self._progress.values():
            for sequence in progress.sequences:
                self.scheduler.cancel(sequence)
                self._give_slot_back(sequence)
        self._progress.clear()
        self._fresh.clear()
        self._begun.clear()

    def take_begun(self) -> list[str]:
        """The requests that have begun since the last call."""
        begun, self._begun = self._begun, []
        return begun

    def counts(self, step: int) -> StepWork:
        """What a step in flight asks for."""
        return count_work(self._in_flight[step])

    def next_batch(self) -> RunBatch | None:
        """The next step's command, or None when nothing can run until a result comes back. Ask while it `has_room`."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        if self._fresh:
            for chunk in chunks:
                key = chunk.sequence.request.key
                if key in self._fresh:
                    self._fresh.remove(key)
                    self._begun.append(key)
        batch = make_batch(self._num_steps, chunks, self._admitted(chunks))
        self._in_flight[self._num_steps] = chunks
        for row, chunk in enumerate(chunk for chunk in chunks if chunk.samples):
            chunk.sequence.last_row = row
        self._num_steps += 1
        return batch

    def _admitted(self, chunks: list[Chunk]) -> list[Sequence]:
        """Sequences with penalties that are sampled for the first time: each gets a slot."""
        admitted = []
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.is_penalised and sequence.slot < 0 and chunk.samples:
                sequence.slot = heappop(self._free_slots) if self._free_slots else self._num_slots
                self._num_slots = max(self._num_slots, sequence.slot + 1)
                admitted.append(sequence)
        return admitted

    def _give_slot_back(self, sequence: Sequence) -> None:
        """What is in flight of it runs before any step that gives the slot to another."""
        if sequence.slot >= 0:
            heappush(self._free_slots, sequence.slot)
            sequence.slot = -1

    def apply(self, result: StepResult) -> list[tuple[str, RequestOutput]]:
        """Take in a step's tokens; returns the requests that are finished by them, or have failed."""
        chunks = self._in_flight.pop(result.step)
        self.scheduler.returned(chunks)
        self._apply_prompt_logprobs(chunks, result)
        finished = []
        sampled = [chunk.sequence for chunk in chunks if chunk.samples]
        for row, (sequence, token) in enumerate(zip(sampled, read_int32(result.tokens).tolist(), strict=True)):
            if sequence.is_done:  # it ended with the token before, while this one was on its way
                continue
            if token < 0 or sequence.is_unscored:
                failed = self._stumbled(sequence)
                if failed is not None:
                    finished.append((sequence.request.key, failed))
                continue
            sequence.tokens.append(token)
            if row in result.logprobs:
                sequence.logprobs.append(result.logprobs[row])
            ending = self._ending(sequence, token)
            if ending is not None:
                output = self._complete(sequence, *ending)
                if output is not None:
                    finished.append((sequence.request.key, output))
        return finished

    def _apply_prompt_logprobs(self, chunks: list[Chunk], result: StepResult) -> None:
        entries = iter(result.prompt_logprobs)
        for chunk in chunks:
            for position in chunk.scored_positions:
                entry = next(entries)
                chunk.sequence.prompt_logprobs[position + 1] = entry
                chunk.sequence.is_unscored |= not entry

    def _stumbled(self, sequence: Sequence) -> RequestOutput | None:
        """A sequence's logits are not numbers; the request's output when that is its own fault.

        It may be that of another one whose blocks it has taken over: a token that is no number spoils those before it
        too, where they are computed together. So the sequence begins again by itself, and fails only if it still does.
        """
        request, progress = sequence.request, self._progress[sequence.request.key]
        if not sequence.is_secluded:
            self._give_slot_back(sequence)
            progress.sequences[sequence.sample] = self.scheduler.seclude(sequence)
            return None
        for one in progress.sequences:
            self.scheduler.cancel(one)
            self._give_slot_back(one)
        del self._progress[request.key]
        count = len(sequence.tokens) - sequence.prompt_length
        where = f"after {count} token(s) of output" if count else "after the prompt"
        return RequestOutput(
            prompt_tokens=len(request.prompt),
            completions=[],
            failure=f"the model's logits {where} are not numbers (NaN or infinite): a weight that these tokens use is "
            "broken, or values overflow in this dtype",
        )

    def _ending(self, sequence: Sequence, token: int) -> tuple[str, str | int | None] | None:
        """Why the sequence ends with this token, or None."""
        sampling: SamplingParams = sequence.request.sampling
        if token in self._eos and not sampling.ignore_eos:
            return "stop", None
        if token in sampling.stop_token_ids:
            return "stop", token
        if sequence.scanner is not None and sequence.scanner.push(token):
            return "stop", sequence.scanner.found
        if len(sequence.tokens) - sequence.prompt_length >= sampling.max_tokens:
            return "length", None
        return None

    def _complete(self, sequence: Sequence, reason: str, stop: str | int | None) -> RequestOutput | None:
        """Close a sequence; the request's output when it was the last of its samples."""
        self.scheduler.finish(sequence)
        self._give_slot_back(sequence)
        request = sequence.request
        progress = self._progress[request.key]
        has_logprobs = request.sampling.logprobs is not None
        scanner = sequence.scanner
        progress.done[sequence.sample] = Completion(
            index=sequence.sample,
            token_ids=sequence.generated,
            finish_reason=reason,
            stop_reason=stop,
            cut=scanner.cut if scanner is not None and isinstance(stop, str) else None,
            logprobs=sequence.logprobs if has_logprobs else None,
        )
        if sequence.sample == 0:
            progress.prompt_logprobs = sequence.prompt_logprobs
        if len(progress.done) < request.sampling.n:
            return None
        del self._progress[request.key]
        prompt_logprobs: list[list[TokenLogprob] | None] | None = None
        if request.sampling.prompt_logprobs is not None:
            known = progress.prompt_logprobs
            prompt_logprobs = [None, *(known[position] for position in range(1, len(request.prompt)))]
        completions = [progress.done[index] for index in range(request.sampling.n)]
        return RequestOutput(
            prompt_tokens=len(request.prompt),
            completions=completions,
            preceding=request.preceding,
            prompt=None if prompt_logprobs is None else request.prompt,
            prompt_logprobs=prompt_logprobs,
        )
