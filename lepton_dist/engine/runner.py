"""Running one batch on this rank's stage."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import torch

from lepton_dist.engine.batch import RunBatch, SampleRows, read_int32, read_spans
from lepton_dist.engine.kv_cache import KvCache, lay_out
from lepton_dist.engine.sampler import VocabShard, sample, score
from lepton_dist.parallel.stage import ParallelStage
from lepton_dist.text.completion import TokenLogprob


class StepResult(msgspec.Struct, tag=True):
    """What the last stage says of a step: tokens int32 [r], and log-probabilities where they were asked for."""

    step: int
    tokens: bytes
    logprobs: dict[int, list[TokenLogprob]]
    prompt_logprobs: list[list[TokenLogprob]]


class StageRunner:
    """Runs batches in the order of their commands. `expect` each batch as soon as it is known, then `run` it."""

    def __init__(self, stage: ParallelStage, cache: KvCache) -> None:
        self._stage, self._cache = stage, cache
        rope = stage.decoder.rope
        self._has_long = rope is not None and rope.has_long

    def expect(self, batch: RunBatch) -> None:
        """Post the receive of the batch's activations."""
        self._stage.link.expect(batch.num_tokens)

    @torch.inference_mode()
    def run(self, batch: RunBatch) -> StepResult | None:
        """Run a batch that was expected; the last stage returns the result, the others pass the activations on."""
        stage = self._stage
        positions, paged = lay_out(batch, self._cache.geometry.block_tokens)
        if stage.seat.is_first:
            tokens = torch.from_numpy(read_int32(batch.tokens).astype(np.int64))
            hidden = stage.decoder.embed(tokens, positions)
        else:
            hidden = stage.link.receive()
        attend = partial(self._cache.attend, paged)
        hidden = stage.decoder.run_layers(hidden, positions, self._is_long(batch), attend)
        if stage.seat.is_last:
            return self._finish(batch, hidden)
        stage.link.send(hidden)
        return None

    def _is_long(self, batch: RunBatch) -> torch.Tensor | None:
        if not self._has_long:
            return None
        spans = read_spans(batch)
        return torch.from_numpy(np.repeat(spans[:, 4].astype(bool), spans[:, 1]))

    def _finish(self, batch: RunBatch, hidden: torch.Tensor) -> StepResult:
        """Norm, head and sampling of the rows that ask for it."""
        head = self._stage.decoder.head
        if head is None:
            raise ValueError("this stage has no head: only the last has")
        stage = self._stage
        shard = VocabShard(stage.vocab_start, head.projection.weight.out_features, stage.vocab, stage.tp)
        rows = read_int32(batch.samples.rows)
        tokens = torch.empty(0, dtype=torch.int64)
        logprobs: dict[int, list[TokenLogprob]] = {}
        if rows.size:
            logits = head(hidden[torch.from_numpy(rows.astype(np.int64))])
            tokens, logprobs = self._sample(logits, batch.samples, shard)
        prompt_logprobs = []
        prompt_rows = read_int32(batch.prompt_rows, 3)
        if prompt_rows.size:
            picked = torch.from_numpy(prompt_rows.astype(np.int64))
            prompt_logprobs = score(head(hidden[picked[:, 0]]), picked[:, 1], picked[:, 2].tolist(), shard)
        return StepResult(batch.step, tokens.to(torch.int32).numpy().tobytes(), logprobs, prompt_logprobs)

    def _sample(
        self, logits: torch.Tensor, rows: SampleRows, shard: VocabShard
    ) -> tuple[torch.Tensor, dict[int, list[TokenLogprob]]]:
        asked = read_int32(rows.counts, 4)[:, 1]
        scored = np.flatnonzero(asked >= 0)
        if not scored.size:
            return sample(logits, rows, shard), {}
        index = torch.from_numpy(scored)
        raw = logits[index]  # a copy: sampling changes the logits
        tokens = sample(logits, rows, shard)
        entries = score(raw, tokens[index], asked[scored].tolist(), shard)
        return tokens, dict(zip(scored.tolist(), entries, strict=True))
