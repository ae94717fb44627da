"""Running one batch on this rank's stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.comm.devices import Devices
from lepton_dist.engine.batch import RunBatch, SampleRows, read_int32, read_rows, read_spans
from lepton_dist.engine.decode_graphs import DecodeGraphs
from lepton_dist.engine.kv_cache import CachedAttention, KvCache, Layout, lay_out
from lepton_dist.engine.penalties import open_penalties
from lepton_dist.engine.sampler import VocabShard, sample, score
from lepton_dist.kernels.attention import ReadRows
from lepton_dist.kernels.upload import upload
from lepton_dist.parallel.stage import ParallelStage
from lepton_dist.text.completion import TokenLogprob


class StepResult(msgspec.Struct, tag=True):
    """What the last stage says of a step: tokens int32 [r], and log-probabilities where they were asked for.

    Where the logits are not numbers the token is -1, and a list of log-probabilities empty.
    """

    step: int
    tokens: bytes
    logprobs: dict[int, list[TokenLogprob]]
    prompt_logprobs: list[list[TokenLogprob]]


class BegunStep:
    """A step of the last stage that was begun; on a GPU its tokens may still be on their way."""

    def __init__(
        self,
        step: int,
        tokens: torch.Tensor,
        logprobs: dict[int, list[TokenLogprob]],
        prompt_logprobs: list[list[TokenLogprob]],
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._step, self._tokens, self._wait = step, tokens, wait
        self._logprobs, self._prompt_logprobs = logprobs, prompt_logprobs

    def result(self) -> StepResult:
        """Wait for the tokens.

        Raises:
            RankLostError: a link that the step goes over is broken, or it takes too long.
        """
        if self._wait is not None:
            self._wait()
        tokens = self._tokens.to(torch.int32).numpy().tobytes()
        return StepResult(self._step, tokens, self._logprobs, self._prompt_logprobs)


class StageRunner:
    """Runs batches in the order of their commands. `expect` each batch as soon as it is known, then `begin` it.

    On a GPU, which `devices` names, a step is put on the stream without waiting; `graphs` hold the decode steps that
    were captured. The tokens that a step drew stay there for the next one, whose command may name their rows.
    """

    def __init__(
        self,
        stage: ParallelStage,
        cache: KvCache,
        devices: Devices | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._stage, self._cache, self._devices, self._graphs = stage, cache, devices, graphs
        self._device = torch.device("cpu") if devices is None else devices.device
        rope = stage.decoder.rope
        self._has_long = rope is not None and rope.has_long
        self._drawn = torch.empty(0, dtype=torch.int64, device=self._device)
        head = stage.decoder.head
        size = 0 if head is None else head.projection.weight.out_features
        self._shard = VocabShard(stage.vocab_start, size, stage.vocab, stage.tp)
        self._penalties = open_penalties(stage.vocab_start, size, self._device)

    def expect(self, batch: RunBatch) -> None:
        """Post the receive of the batch's activations."""
        self._stage.link.expect(batch.num_tokens)

    def progress(self) -> bool:
        """Move on the messages that wait for a GPU; whether some are still waiting. Call it whenever there is time."""
        return self._devices is not None and self._devices.courier.progress()

    def close(self) -> None:
        """Let go of threads, and of captured graphs, which must go before communicators whose operations they hold.

        Raises:
            RankLostError: activations that were sent did not leave in time.
        """
        self._stage.link.flush()
        self._graphs = None
        if self._stage.decoder.overlap is not None:
            self._stage.decoder.overlap.close()

    def run(self, batch: RunBatch) -> StepResult | None:
        """Begin a batch and wait for its result."""
        begun = self.begin(batch)
        return None if begun is None else begun.result()

    @torch.inference_mode()
    def begin(self, batch: RunBatch) -> BegunStep | None:
        """Start a batch that was expected; the last stage will have the result, the others pass the activations on.

        Raises:
            RankLostError: another rank did not come in time, or a link to it is broken.
        """
        stage = self._stage
        layout = lay_out(batch, self._cache.geometry.block_tokens)
        received = None if stage.seat.is_first else stage.link.receive()
        rows = read_rows(batch) if stage.seat.is_last else None
        if self._graphs is not None and self._graphs.can_run(batch):
            hidden = self._graphs.run(batch, layout, self._tokens(batch) if received is None else None, received)
            if rows is not None and len(rows) < batch.num_tokens:
                hidden = hidden[upload(rows, self._device)]
        else:
            hidden = self._run_layers(batch, layout, received, rows)
        if rows is not None:
            return self._finish(batch, hidden, rows)
        stage.link.send(hidden)
        return None

    @torch.inference_mode()
    def rehearse(self, batch: RunBatch, hidden_size: int) -> None:
        """Run a batch without the stages before and behind it: what it computes means nothing, what it takes counts.

        Collective over the stage.
        """
        stage = self._stage
        received = None if stage.seat.is_first else torch.zeros(batch.num_tokens, hidden_size, device=self._device)
        rows = read_rows(batch) if stage.seat.is_last else None
        hidden = self._run_layers(batch, lay_out(batch, self._cache.geometry.block_tokens), received, rows)
        if rows is not None:
            self._finish(batch, hidden, rows)

    def _run_layers(
        self, batch: RunBatch, layout: Layout, hidden: torch.Tensor | None, rows: NDArray[np.int64] | None
    ) -> torch.Tensor:
        """float32 [tokens, hidden]; on the last stage [r, hidden], of its `rows`."""
        decoder, device = self._stage.decoder, self._device
        positions = upload(layout.positions, device)
        if hidden is None:
            hidden = decoder.embed(self._tokens(batch), positions)
        paged, read = layout.paged(device), None
        if rows is not None and len(rows) < batch.num_tokens:
            read = ReadRows(upload(rows, device), paged.of_rows(rows))
        return decoder.run_layers(hidden, positions, self._is_long(batch), CachedAttention(self._cache, paged), read)

    def _tokens(self, batch: RunBatch) -> torch.Tensor:
        """int64 [tokens], with those that the step before drew in their places."""
        given = read_int32(batch.tokens).astype(np.int64)
        tokens = upload(given, self._device)
        if given.min() >= 0:
            return tokens
        # What was drawn is -1 where the logits were no numbers: that row's sequence is over, and any token will do.
        drawn = self._drawn[(-1 - tokens).clamp_(min=0)].clamp_(min=0)
        return torch.where(tokens < 0, drawn, tokens)

    def _is_long(self, batch: RunBatch) -> torch.Tensor | None:
        if not self._has_long:
            return None
        spans = read_spans(batch)
        return upload(np.repeat(spans[:, 4].astype(bool), spans[:, 1]), self._device)

    def _finish(self, batch: RunBatch, hidden: torch.Tensor, read: NDArray[np.int64]) -> BegunStep:
        """Norm, head and sampling; hidden [r, hidden] of the rows `read`."""
        head = self._stage.decoder.head
        if head is None:
            raise ValueError("this stage has no head: only the last has")
        rows = read_int32(batch.samples.rows)
        tokens = torch.empty(0, dtype=torch.int64, device=self._device)
        logprobs: dict[int, list[TokenLogprob]] = {}
        if rows.size:
            sampled = hidden if rows.size == read.size else hidden[upload(np.searchsorted(read, rows), self._device)]
            logits = head(sampled)
            tokens, logprobs = self._sample(logits, batch.samples)
        prompt_logprobs = []
        prompt_rows = read_int32(batch.prompt_rows, 3).astype(np.int64)
        if prompt_rows.size:
            picked = upload(np.searchsorted(read, prompt_rows[:, 0]), self._device)
            following = upload(prompt_rows[:, 1], self._device)
            prompt_logprobs = score(head(hidden[picked]), following, prompt_rows[:, 2].tolist(), self._shard)
        self._drawn = tokens
        host, wait = self._to_host(tokens, batch.step)
        return BegunStep(batch.step, host, logprobs, prompt_logprobs, wait)

    def _sample(self, logits: torch.Tensor, rows: SampleRows) -> tuple[torch.Tensor, dict[int, list[TokenLogprob]]]:
        asked, shard = read_int32(rows.counts, 3)[:, 1], self._shard
        scored = np.flatnonzero(asked >= 0)
        if not scored.size:
            return sample(logits, rows, shard, self._penalties), {}
        index = upload(scored, self._device)
        raw = logits[index]  # a copy: sampling changes the logits
        tokens = sample(logits, rows, shard, self._penalties)
        entries = score(raw, tokens[index].clamp(min=0), asked[scored].tolist(), shard)
        return tokens, dict(zip(scored.tolist(), entries, strict=True))

    def _to_host(self, tokens: torch.Tensor, step: int) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """The tokens on the host, and the wait for them: the one wait of a step, which watches the links meanwhile."""
        if self._devices is None or tokens.is_cpu:
            return tokens, None
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return host, partial(self._devices.wait.until, event, f"step {step}")
