"""Decode steps captured as CUDA graphs: one launch a step instead of some hundred, for each size of batch.

A graph replays the same kernels on the same memory. So its inputs lie in static buffers, which a step fills first, and
batches are padded to the next captured size; a row that is padding has the length 0 and writes to a spare block. The
sizes share one memory pool and run on one stream, one after the other. Sampling follows outside of the graph: what
requests ask of it differs from step to step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from lepton_dist.comm.devices import Devices
from lepton_dist.engine.batch import Int32, RunBatch, read_spans
from lepton_dist.engine.kv_cache import CachedAttention, KvCache, Layout
from lepton_dist.kernels.attention import PagedBatch
from lepton_dist.kernels.cuda.library import triton_problem
from lepton_dist.kernels.upload import upload
from lepton_dist.parallel.stage import ParallelStage

_WARM_UPS = 2  # runs before a capture, in which libraries make their workspaces and kernels are compiled
# Rows of the static fields: position, slot, length, whether it is a long context.
_POSITION, _SLOT, _LENGTH, _IS_LONG, _FIELDS = 0, 1, 2, 3, 4


def bucket_sizes(most: int) -> list[int]:
    """The sizes of batch that are captured, up to `most` sequences: doubling to 8, then by quarters of a power of two.

    So at most a quarter of a larger batch's rows is padding.
    """
    sizes = [1]
    while sizes[-1] < most:
        size = sizes[-1]
        sizes.append(min(size + (size if size < 8 else 1 << (size.bit_length() - 3)), most))
    return sizes


def graph_problem(stage: ParallelStage, devices: Devices) -> str:
    """Why a stage's decode steps cannot be captured, in words; empty when they can. The same on all its ranks."""
    if devices.device.type != "cuda":
        return "it computes on a CPU"
    if stage.tp.size > 1 and stage.tp.gpu_transport != "nccl":
        return f"its sums go over {stage.tp.gpu_transport}, which waits for the GPU"
    if stage.tp.num_nodes > 1 and stage.link.dtype == torch.int8:
        return "its sums travel as int8, through buffers that grow"
    problem = triton_problem()
    return f"attention without Triton looks at lengths on the host ({problem})" if problem else ""


def pack_fields(batch: RunBatch, layout: Layout, size: int, spare_slot: int) -> Int32:
    """int32 [fields, size]: the static fields of a decode batch, padded."""
    spans = read_spans(batch)
    count = len(spans)
    fields = np.zeros((_FIELDS, size), dtype=np.int32)
    fields[_SLOT] = spare_slot
    fields[_POSITION, :count] = layout.positions
    fields[_SLOT, :count] = layout.slots
    fields[_LENGTH, :count] = layout.spans[:, 2]
    fields[_IS_LONG, :count] = spans[:, 4]
    return fields


class DecodeGraphs:
    """The captured decode steps of one stage, for batches of up to `sizes[-1]` sequences of `max_blocks` blocks."""

    def __init__(
        self,
        stage: ParallelStage,
        cache: KvCache,
        devices: Devices,
        sizes: Sequence[int],
        max_blocks: int,
        hidden_size: int,
    ) -> None:
        self._stage, self._cache, self._device = stage, cache, devices.device
        self._sizes = sorted(sizes)
        most = self._sizes[-1]
        # Made outside of inference mode, so that steps inside of it may fill them.
        with torch.inference_mode(False):
            self._fields = torch.zeros((_FIELDS, most), dtype=torch.int32, device=self._device)
            self._tokens = torch.zeros(most, dtype=torch.int64, device=self._device)
            self._tables = torch.zeros((most, max_blocks), dtype=torch.int32, device=self._device)
            self._hidden = torch.zeros((most, hidden_size), dtype=torch.float32, device=self._device)
            self._fields[_SLOT] = cache.spare_slot
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every size, the largest first: the others then fit into its memory. Collective over the stage."""
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        for size in reversed(self._sizes):
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._step(size)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls belong to the capture: NCCL has threads of its own.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = self._step(size)
            self._graphs[size] = graph, output
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def can_run(self, batch: RunBatch) -> bool:
        """Whether a batch is one new token each of not too many sequences."""
        spans = read_spans(batch)
        return (
            len(spans) <= self._sizes[-1]
            and bool((spans[:, 1] == 1).all())
            and int(spans[:, 3].max()) <= self._tables.shape[1]
        )

    def run(
        self, batch: RunBatch, layout: Layout, tokens: torch.Tensor | None, received: torch.Tensor | None
    ) -> torch.Tensor:
        """Replay the step of a batch that `can_run`: what the layers give, float32 [tokens, hidden].

        It begins with `tokens` int64 [tokens] on the first stage, with what was `received` on the others.

        On the last stage it lies in static memory: read it, on the current stream, before the next step. The others
        send it, perhaps from another stream, and get a copy.
        """
        count, width = layout.tables.shape
        size = self._sizes[bisect_left(self._sizes, count)]
        fields = upload(pack_fields(batch, layout, size, self._cache.spare_slot), self._device)
        self._fields[:, :size].copy_(fields)
        self._tables[:count, :width].copy_(upload(layout.tables.astype(np.int32), self._device))
        if tokens is not None:
            self._tokens[:count].copy_(tokens)
        if received is not None:
            self._hidden[:count].copy_(received)
        graph, output = self._graphs[size]
        graph.replay()
        return output[:count] if self._stage.seat.is_last else output[:count].clone()

    def _step(self, size: int) -> torch.Tensor:
        """The step of `size` rows on the static buffers; with its own copy of the activations, which layers change."""
        decoder = self._stage.decoder
        fields = self._fields[:, :size]
        positions = fields[_POSITION].long()
        batch = PagedBatch.of_decodes(fields[_SLOT], self._tables[:size], fields[_LENGTH])
        if self._stage.seat.is_first:
            hidden = decoder.embed(self._tokens[:size], positions)
        else:
            hidden = self._hidden[:size].clone()
        has_long = decoder.rope is not None and decoder.rope.has_long
        is_long = fields[_IS_LONG].bool() if has_long else None
        return decoder.run_layers(hidden, positions, is_long, CachedAttention(self._cache, batch))
