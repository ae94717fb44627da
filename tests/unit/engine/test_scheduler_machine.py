"""The scheduler and the block bookkeeping as a state machine: random arrivals, batches that come back in order.

Beside them stands a model of the cache: which tokens each slot's keys and values were computed from. A chunk may only
read slots that hold exactly its own sequence's tokens. That one rule covers sharing, freeing, reuse and preemption.
"""

from __future__ import annotations

from collections import Counter, deque

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.kv_blocks import KvBlocks
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.scheduler import Chunk, Scheduler

ALPHABET = 2  # few different tokens, so that prefixes meet


class Machine(RuleBasedStateMachine):
    """One replica: up to `num_stages` batches in flight, and one more where it runs ahead."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_tokens=st.sampled_from([1, 2, 4]),
        max_batch_tokens=st.integers(1, 20),
        max_sequences=st.integers(1, 6),
        num_stages=st.integers(1, 3),
        has_prefix_cache=st.booleans(),
        runs_ahead=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_tokens: int,
        max_batch_tokens: int,
        max_sequences: int,
        num_stages: int,
        has_prefix_cache: bool,
        runs_ahead: bool,
    ) -> None:
        self.blocks = KvBlocks(num_blocks, block_tokens, has_prefix_cache=has_prefix_cache)
        self.ahead = int(runs_ahead and num_stages == 1)
        self.scheduler = Scheduler(
            self.blocks,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            num_stages=num_stages,
            ahead=self.ahead,
        )
        self.budget, self.most_in_flight, self.max_sequences = max_batch_tokens, num_stages + self.ahead, max_sequences
        self.capacity = num_blocks * block_tokens
        self.alive: list[Sequence] = []
        self.in_flight: deque[list[Chunk]] = deque()
        self.slots: dict[int, tuple[bool, tuple[int, ...]]] = {}
        self.num_added = self.num_finished = 0

    @rule(data=st.data(), is_long=st.booleans(), wants_logprobs=st.booleans())
    def add(self, data: st.DataObject, is_long: bool, wants_logprobs: bool) -> None:
        length = data.draw(st.integers(1, self.capacity - 1), label="prompt")
        output = data.draw(st.integers(1, self.capacity - length), label="output")
        prompt = data.draw(st.lists(st.integers(0, ALPHABET - 1), min_size=length, max_size=length), label="tokens")
        sampling = SamplingParams(max_tokens=output, prompt_logprobs=0 if wants_logprobs else None)
        sequence = Sequence(Request(str(self.num_added), prompt, sampling), 0, self.num_added, is_long)
        self.num_added += 1
        self.alive.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: len(self.in_flight) < self.most_in_flight)
    @rule()
    def schedule(self) -> None:
        could_run = self.scheduler.has_work and not self.in_flight
        computed = {id(sequence): sequence.num_computed for sequence in self.alive}
        pending = Counter(id(chunk.sequence) for batch in self.in_flight for chunk in batch if chunk.samples)
        chunks = self.scheduler.schedule()
        assert not could_run or chunks, "there is work, nothing is in flight, and yet nothing runs"
        if not chunks:
            return
        assert sum(chunk.count for chunk in chunks) <= self.budget
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            assert pending[id(sequence)] <= self.ahead, "its last token has not come back"
            assert chunk.count > 0 and sequence.num_computed == chunk.start + chunk.count
            assert chunk.start == computed[id(sequence)] or chunk.start % self.blocks.block_tokens == 0
            assert chunk.samples == (sequence.num_computed == len(sequence.tokens) + pending[id(sequence)])
            assert chunk.start < sequence.prompt_length + sequence.request.sampling.max_tokens
        self._compute(chunks)
        self.in_flight.append(chunks)

    def _compute(self, chunks: list[Chunk]) -> None:
        """A stage writes the whole batch's keys and values, then reads them."""
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + chunk.count):
                self.slots[self._slot(chunk.sequence, position)] = self._content(chunk.sequence, position)
        for chunk in chunks:
            for position in range(chunk.start + chunk.count):
                held = self.slots.get(self._slot(chunk.sequence, position))
                assert held == self._content(chunk.sequence, position), "reads another sequence's keys and values"

    def _slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.block_table[position // self.blocks.block_tokens]
        return block * self.blocks.block_tokens + position % self.blocks.block_tokens

    @staticmethod
    def _content(sequence: Sequence, position: int) -> tuple[bool, tuple[int, ...]]:
        """What the keys and values follow from. Tokens that are pending will be those that `_drawn` tells of."""
        known = sequence.tokens[: position + 1]
        pending = (Machine._drawn(sequence, place) for place in range(len(known), position + 1))
        return sequence.is_long, (*known, *pending)

    @staticmethod
    def _drawn(sequence: Sequence, position: int) -> int:
        return (sequence.arrival * 7 + position * position // 3) % ALPHABET

    @precondition(lambda self: self.in_flight)
    @rule(ends=st.booleans())
    def come_back(self, ends: bool) -> None:
        chunks = self.in_flight.popleft()
        self.scheduler.returned(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            for position in chunk.scored_positions:
                sequence.prompt_logprobs[position + 1] = []
            if not chunk.samples or sequence.is_done:
                continue
            sequence.tokens.append(self._drawn(sequence, len(sequence.tokens)))
            if ends or len(sequence.generated) == sequence.request.sampling.max_tokens:
                self.scheduler.finish(sequence)
                self.alive.remove(sequence)
                self.num_finished += 1
                if sequence.request.sampling.prompt_logprobs is not None:
                    assert sorted(sequence.prompt_logprobs) == list(range(1, sequence.prompt_length))

    @rule()
    def drop_waiting(self) -> None:
        for sequence in self.scheduler.drop_waiting():
            assert not sequence.generated and not sequence.block_table
            self.alive.remove(sequence)
            self.num_finished += 1

    @invariant()
    def blocks_add_up(self) -> None:
        if not hasattr(self, "blocks"):
            return
        holders: dict[int, int] = {}
        for sequence in self.alive:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            for block in sequence.block_table:
                holders[block] = holders.get(block, 0) + 1
        assert self.blocks.num_free + len(holders) == self.blocks.num_blocks
        assert self.scheduler.num_running <= self.max_sequences
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.alive)

    def teardown(self) -> None:
        """Whatever happened, everything that is left finishes, and every block is free then."""
        if not hasattr(self, "blocks"):
            return
        # Each token is computed at least once a step; preemption may repeat a sequence's work for each older one.
        steps_left = 50 + 4 * (self.capacity + 1) * (len(self.alive) + 1) ** 2
        while self.scheduler.has_work:
            if len(self.in_flight) < self.most_in_flight:
                self.schedule()
            if self.in_flight:
                self.come_back(False)
            steps_left -= 1
            assert steps_left > 0, f"{len(self.alive)} sequences make no progress"
        while self.in_flight:
            self.come_back(False)
        assert not self.alive and self.num_finished == self.num_added
        assert self.blocks.num_free == self.blocks.num_blocks


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40)
