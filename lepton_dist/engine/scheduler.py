"""Which sequences run in the next batch: continuous batching with chunked prefill and preemption. Pure.

Running sequences come first, oldest first, then new ones; each batch stays within a budget of tokens (Sarathi-Serve,
arXiv:2403.02310). When blocks run out, the youngest running sequence gives up its own and is computed anew later.
A sequence whose next token has not come back is not scheduled again, but for `ahead` tokens that the stage itself puts
in their place; with several stages the running ones are dealt out over as many batches as there are stages, so that
every stage has work.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass

from lepton_dist.engine.kv_blocks import KvBlocks
from lepton_dist.engine.request import Sequence

_FEW = 8  # sequences that are searched for one by one


@dataclass(slots=True)
class Chunk:
    """Tokens [start, start + count) of a sequence; not changed once made.

    `samples` when the last of its tokens is among them, so that the next one is drawn; `scores_prompt` when the
    log-probabilities of its prompt are wanted.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    scores_prompt: bool

    @property
    def scored_positions(self) -> range:
        """Positions of the prompt whose following token is scored: the last one's successor is drawn, not given."""
        last = min(self.start + self.count, self.sequence.prompt_length - 1)
        return range(self.start, last if self.scores_prompt else self.start)


class Scheduler:
    """State in, decision out: `schedule` says what to run, `returned` and `finish` say what became of it.

    `num_running` sequences hold blocks.
    """

    def __init__(
        self, blocks: KvBlocks, *, max_batch_tokens: int, max_sequences: int, num_stages: int, ahead: int = 0
    ) -> None:
        self.blocks, self._ahead = blocks, ahead
        self.num_preemptions = self.num_reused_tokens = self.num_running = 0
        self._max_batch_tokens, self._max_sequences, self._num_stages = max_batch_tokens, max_sequences, num_stages
        self._waiting: deque[Sequence] = deque()
        # By arrival. Who runs no more is taken out before the next batch, all at once.
        self._running: list[Sequence] = []
        self._num_batches = 0
        self._victims: Iterator[Sequence] = iter(())

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self.num_running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Its prompt and output must fit the cache (see `KvBlocks.num_blocks`)."""
        self._waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """The next batch, marked as in flight; empty when nothing can run now."""
        self._tidy()
        self._num_batches += 1
        self._victims = reversed(self._running)
        chunks: list[Chunk] = []
        budget = self._max_batch_tokens
        limit = -(-max(self.num_running, 1) // self._num_stages)
        # Decodes first: a long prompt must not hold them up.
        budget, prompts = self._decode(budget, limit, chunks)
        for sequence in prompts:
            if budget == 0 or len(chunks) == limit:  # of those that got room: a preempted one counts for none
                break
            if sequence.is_running:  # it may have been preempted for an older one of this batch
                budget -= self._take(sequence, budget, chunks)
        if self._waiting and budget > 0:
            self._admit_waiting(budget, limit, chunks)
        return chunks

    def _decode(self, budget: int, limit: int, chunks: list[Chunk]) -> tuple[int, list[Sequence]]:
        """Add the sequences with one token to compute; returns the budget left, and those with more.

        Of a thousand sequences nearly all come through here at every step, and most need nothing but their place.
        """
        ahead, block_tokens, publish = self._ahead, self.blocks.block_tokens, self.blocks.publish
        prompts: list[Sequence] = []
        for sequence in self._running:
            pending, start = sequence.num_pending, sequence.num_computed
            if pending and (pending > ahead or not sequence.can_run_ahead):
                continue
            if len(sequence.tokens) + pending - start > 1:
                prompts.append(sequence)
            elif budget == 0 or len(chunks) == limit:
                return budget, []
            elif not sequence.is_running:
                continue
            elif start == len(sequence.block_table) * block_tokens:
                budget -= self._take(sequence, budget, chunks)
            else:
                chunks.append(Chunk(sequence, start, 1, True, False))
                sequence.num_computed = start + 1
                sequence.num_pending = pending + 1
                budget -= 1
                if (start + 1) % block_tokens < 2:  # a block is full, or its last token, then pending, has become known
                    publish(sequence)
        return budget, prompts

    def _admit_waiting(self, budget: int, limit: int, chunks: list[Chunk]) -> None:
        """Add sequences that wait, first come first served, while there is room."""
        self._tidy()
        while self._waiting and budget > 0 and self.num_running < self._max_sequences:
            if not self._admit(self._waiting[0]):
                break
            sequence = self._waiting.popleft()
            bisect.insort(self._running, sequence, key=_arrival)
            sequence.is_running = True
            self.num_running += 1
            budget -= self._take(sequence, budget, chunks)
            if self._num_stages > 1 and len(chunks) >= max(limit, 1) and self._is_prefill_heavy(budget):
                break

    def returned(self, chunks: list[Chunk]) -> None:
        """A batch came back: its sequences may be scheduled again."""
        for chunk in chunks:
            if chunk.samples:
                chunk.sequence.num_pending -= 1

    def drop_waiting(self, keys: Container[str] | None = None) -> list[Sequence]:
        """Take out the sequences that have not begun, of these requests or of all, and return them."""
        dropped = [
            sequence
            for sequence in self._waiting
            if (keys is None or sequence.request.key in keys) and sequence.is_fresh
        ]
        if len(dropped) < _FEW:
            for sequence in dropped:
                self._waiting.remove(sequence)
        else:
            gone = set(dropped)
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in gone)
        return dropped

    def finish(self, sequence: Sequence) -> None:
        """A sequence is done: its blocks are free. What it has in flight runs before any batch that reuses them."""
        sequence.is_done = True
        self._stop(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Give up a sequence, running or waiting, and offer nothing of it to others."""
        if sequence.is_running:
            self.blocks.withdraw(sequence)
            self.finish(sequence)
        elif not sequence.is_done:
            sequence.is_done = True
            self._waiting.remove(sequence)

    def seclude(self, sequence: Sequence) -> Sequence:
        """Give up a running sequence and begin it again by itself, before all that wait; returns the new one."""
        self.cancel(sequence)
        again = sequence.secluded()
        self._waiting.appendleft(again)
        return again

    def _stop(self, sequence: Sequence) -> None:
        sequence.is_running = False
        self.num_running -= 1
        self.blocks.release(sequence)

    def _tidy(self) -> None:
        if len(self._running) != self.num_running:
            self._running = [sequence for sequence in self._running if sequence.is_running]

    def _is_prefill_heavy(self, budget: int) -> bool:
        """Whether a pipeline's batch already has its share of the work in tokens."""
        return self._max_batch_tokens - budget >= self._max_batch_tokens // self._num_stages

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add the sequence's next chunk to the batch, making room if need be; returns its number of tokens."""
        count = min(sequence.num_uncomputed, budget)
        if not self._make_room(sequence, sequence.num_computed + count):
            return 0
        samples, scores = count == sequence.num_uncomputed, sequence.wants_prompt_logprobs
        chunks.append(Chunk(sequence, sequence.num_computed, count, samples, scores))
        sequence.num_computed += count
        sequence.num_pending += samples  # the next chunk of a prompt need not wait for this one
        sequence.last_batch = self._num_batches
        self.blocks.publish(sequence)
        return count

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for `num_tokens` tokens, preempting younger sequences; False when it has to wait itself."""
        while not self.blocks.extend(sequence, num_tokens):
            # Nobody becomes idle while a batch is put together: who was passed over once need not be looked at again.
            victim = next((other for other in self._victims if self._is_idle(other)), None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _is_idle(self, sequence: Sequence) -> bool:
        """Whether it has nothing in flight, and is not in this batch."""
        return sequence.is_running and not sequence.num_pending and sequence.last_batch != self._num_batches

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._stop(sequence)
        self._waiting.appendleft(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Whether a new sequence's whole prompt fits beside a block of growth for each running one."""
        self.blocks.reuse_prefix(sequence)
        needed = self.blocks.missing(sequence, len(sequence.tokens))
        if needed + self.num_running <= self.blocks.num_free or not self.num_running:
            self.num_reused_tokens += sequence.num_computed
            return True
        self.blocks.release(sequence)
        return False


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
