"""What a batch asks of a stage, counted: for the cost model, the balancer and the simulator. Pure."""

from __future__ import annotations

from typing import NamedTuple

from lepton_dist.engine.scheduler import Chunk


class StepWork(NamedTuple):
    """What one batch asks of every stage.

    `tokens` are rows through the layers, `samples` rows through the head. `decode_kv_tokens` is the sum of the context
    lengths of sequences with one new token, `prefill_pairs` that of (query, key) pairs over chunks of prompts.
    """

    tokens: int
    samples: int
    sequences: int
    decode_kv_tokens: int = 0
    prefill_pairs: int = 0


def chunk_pairs(start: int, count: int) -> int:
    """(query, key) pairs of a chunk of `count` tokens behind `start` others: each token sees itself and all before."""
    return count * start + count * (count + 1) // 2


def count_work(chunks: list[Chunk]) -> StepWork:
    """The work of a batch."""
    tokens = samples = decode_kv_tokens = prefill_pairs = 0
    for chunk in chunks:
        tokens += chunk.count
        samples += chunk.samples
        if chunk.count == 1:
            decode_kv_tokens += chunk.start + 1
        else:
            prefill_pairs += chunk_pairs(chunk.start, chunk.count)
    return StepWork(tokens, samples, len(chunks), decode_kv_tokens, prefill_pairs)
