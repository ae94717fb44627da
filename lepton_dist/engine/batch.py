"""A batch as it travels to the ranks of a replica: flat arrays, no objects."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence as Seq

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_dist.engine.scheduler import Chunk
from lepton_dist.kernels.noise import noise_key

Int32 = NDArray[np.int32]
_SPAN_FIELDS = 5  # start, count, length, number of blocks, whether it is a long context


class SampleRows(msgspec.Struct, array_like=True):
    """The rows of a batch whose logits are sampled, r of them.

    rows int32 [r]; settings float32 [r, 6]: temperature, top_p, min_p, repetition, presence and frequency penalty;
    counts int32 [r, 4]: top_k, logprobs (-1 none), length of prompt and of output in `history`; keys int32 [r, 2]:
    the noise; history int32: the tokens of the rows with penalties, prompt before output.
    """

    rows: bytes
    settings: bytes
    counts: bytes
    keys: bytes
    history: bytes


class RunBatch(msgspec.Struct, tag=True):
    """The command of one step: what every stage of a replica needs to know of a batch.

    tokens int32 [tokens], where -1 - r is what the step before drew as its row r; spans int32 [sequences, 5];
    block_tables int32, one behind the other; prompt_rows int32 [p, 3]: row, the token that follows it in the prompt,
    and how many of the likeliest to report.
    """

    step: int
    tokens: bytes
    spans: bytes
    block_tables: bytes
    samples: SampleRows
    prompt_rows: bytes

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return len(self.tokens) // 4


def read_int32(data: bytes, width: int = 0) -> Int32:
    """A flat buffer as int32 [n], or [n, width]. Read only."""
    values = np.frombuffer(data, dtype=np.int32)
    return values.reshape(-1, width) if width else values


def read_spans(batch: RunBatch) -> Int32:
    """int32 [sequences, 5]: start, count, length, number of blocks, is long."""
    return read_int32(batch.spans, _SPAN_FIELDS)


def read_rows(batch: RunBatch) -> NDArray[np.int64]:
    """The rows that are read behind the last layer, to be sampled or scored: ascending int64 [r]."""
    sampled, scored = read_int32(batch.samples.rows), read_int32(batch.prompt_rows, 3)[:, 0]
    return (np.union1d(sampled, scored) if scored.size else sampled).astype(np.int64)


def make_batch(step: int, chunks: Seq[Chunk]) -> RunBatch:
    """The command for a scheduled batch."""
    spans: list[int] = []
    tokens: list[int] = []
    tables: list[array[int]] = []
    row = 0
    rows: list[int] = []
    sampled: list[Chunk] = []
    prompt_rows: list[tuple[int, int, int]] = []
    for chunk in chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.count
        spans += (row, chunk.count, end, len(sequence.block_table), sequence.is_long)
        if chunk.count > 1:
            tokens += sequence.tokens[chunk.start : end]
        else:
            is_known = chunk.start < len(sequence.tokens)
            tokens.append(sequence.tokens[chunk.start] if is_known else -1 - sequence.last_row)
        tables.append(sequence.block_table)
        if chunk.scores_prompt:
            asked = sequence.request.sampling.prompt_logprobs or 0
            prompt_rows.extend((row + p - chunk.start, sequence.tokens[p + 1], asked) for p in chunk.scored_positions)
        row += chunk.count
        if chunk.samples:
            rows.append(row - 1)
            sampled.append(chunk)
    return RunBatch(
        step=step,
        tokens=np.array(tokens, dtype=np.int32).tobytes(),
        spans=np.array(spans, dtype=np.int32).tobytes(),
        block_tables=b"".join(tables),
        samples=_sample_rows(rows, sampled),
        prompt_rows=np.array(prompt_rows, dtype=np.int32).tobytes(),
    )


def _flat(lists: Seq[list[int]]) -> bytes:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32).tobytes()


def _sample_rows(rows: list[int], chunks: list[Chunk]) -> SampleRows:
    settings, counts, keys, history = [], [], [], []
    for chunk in chunks:
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        settings.append((sampling.temperature, sampling.top_p, sampling.min_p, *penalties))
        output = len(sequence.tokens) - sequence.prompt_length
        lengths = (sequence.prompt_length, output) if sampling.has_penalties else (0, 0)
        counts.append((max(sampling.top_k, 0), -1 if sampling.logprobs is None else sampling.logprobs, *lengths))
        is_greedy = sampling.temperature == 0
        keys.append((0, 0) if is_greedy else noise_key(sampling.seed or 0, sequence.sample, chunk.start + chunk.count))
        if sampling.has_penalties:
            history.append(sequence.tokens)
    return SampleRows(
        rows=np.array(rows, dtype=np.int32).tobytes(),
        settings=np.array(settings, dtype=np.float32).tobytes(),
        counts=np.array(counts, dtype=np.int32).tobytes(),
        keys=np.array(keys, dtype=np.int32).tobytes(),
        history=_flat(history),
    )
