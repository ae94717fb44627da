"""A batch as it travels to the ranks of a replica: flat arrays, no objects."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_dist.engine.request import Sequence
from lepton_dist.engine.scheduler import Chunk
from lepton_dist.kernels.noise import noise_key

Int32 = NDArray[np.int32]
_SPAN_FIELDS = 5  # start, count, length, number of blocks, whether it is a long context


class SampleRows(msgspec.Struct, array_like=True):
    """The rows of a batch whose logits are sampled, r of them.

    rows int32 [r]; settings float32 [r, 6]: temperature, top_p, min_p, repetition, presence and frequency penalty;
    counts int32 [r, 3]: top_k, logprobs (-1 none), slot of the history that penalties look at (-1 none); keys int32
    [r, 2]: the noise; admitted int32: of each slot that begins with this step the slot, the lengths of prompt and
    output, and their tokens.
    """

    rows: bytes
    settings: bytes
    counts: bytes
    keys: bytes
    admitted: bytes


class Admitted(NamedTuple):
    """What a slot begins with: the prompt, and the output so far."""

    slot: int
    prompt: Int32
    output: Int32


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


def read_slots(rows: SampleRows) -> tuple[Int32, NDArray[np.float32]]:
    """The slots int32 [r], and the penalties [r, 3]: repetition, presence, frequency."""
    return read_int32(rows.counts, 3)[:, 2], np.frombuffer(rows.settings, dtype=np.float32).reshape(-1, 6)[:, 3:]


def read_admitted(rows: SampleRows) -> Iterator[Admitted]:
    """The slots that begin with a step."""
    values, at = read_int32(rows.admitted), 0
    while at < len(values):
        slot, prompt, output = values[at : at + 3].tolist()
        at += 3
        yield Admitted(slot, values[at : at + prompt], values[at + prompt : at + prompt + output])
        at += prompt + output


def make_batch(step: int, chunks: Seq[Chunk], admitted: Seq[Sequence] = ()) -> RunBatch:
    """The command for a scheduled batch; of the sequences `admitted` the slots begin with it."""
    spans: list[int] = []
    tokens: list[int] = []
    tables: list[array[int]] = []
    row = 0
    rows: list[int] = []
    sampled: list[Chunk] = []
    prompt_rows: list[int] = []
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
            for position in chunk.scored_positions:
                prompt_rows += (row + position - chunk.start, sequence.tokens[position + 1], asked)
        row += chunk.count
        if chunk.samples:
            rows.append(row - 1)
            sampled.append(chunk)
    return RunBatch(
        step=step,
        tokens=_packed(tokens),
        spans=_packed(spans),
        block_tables=b"".join(tables),
        samples=_sample_rows(rows, sampled, admitted),
        prompt_rows=_packed(prompt_rows),
    )


def _sample_rows(rows: list[int], sampled: list[Chunk], admitted: Seq[Sequence]) -> SampleRows:
    settings: list[bytes] = []
    counts: list[int] = []
    keys: list[int] = []
    for chunk in sampled:
        sequence = chunk.sequence
        sampling = sequence.request.sampling
        settings.append(sequence.settings or _keep_settings(sequence))
        counts += (max(sampling.top_k, 0), -1 if sampling.logprobs is None else sampling.logprobs, sequence.slot)
        if sampling.temperature == 0:
            keys += (0, 0)
        else:
            keys += noise_key(sampling.seed or 0, sequence.sample, chunk.start + chunk.count)
    histories: list[int] = []
    for sequence in admitted:
        histories += (sequence.slot, sequence.prompt_length, len(sequence.tokens) - sequence.prompt_length)
        histories += sequence.tokens
    return SampleRows(
        rows=_packed(rows),
        settings=b"".join(settings),
        counts=_packed(counts),
        keys=_packed(keys),
        admitted=_packed(histories),
    )


def _packed(values: list[int]) -> bytes:
    return array("i", values).tobytes()


def _keep_settings(sequence: Sequence) -> bytes:
    """The settings of a sequence as its rows carry them, packed once."""
    sampling = sequence.request.sampling
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    sequence.settings = array("f", (sampling.temperature, sampling.top_p, sampling.min_p, *penalties)).tobytes()
    return sequence.settings
