"""How much of a GPU is left for the KV cache: measured, with the weights loaded, by the largest steps there can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lepton_dist.comm.devices import Devices
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch, make_batch
from lepton_dist.engine.kv_cache import KvCache
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.runner import StageRunner
from lepton_dist.engine.scheduler import Chunk
from lepton_dist.parallel.stage import ParallelStage
from lepton_dist.plan.plan import EngineLimits

# What stays free of a GPU for fragments, for the libraries, and for kernels that are loaded later.
_SPARE_BYTES = 256 << 20
_SPARE_PART = 50  # one part of so many of the whole
# A sampling that takes every way through the sampler, and so the most memory.
_DEAREST = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, max_tokens=1, seed=0)


@dataclass(frozen=True)
class Rehearsed:
    """What the largest steps follow from."""

    limits: EngineLimits
    context_tokens: int
    hidden: int


def kv_room_bytes(*, free: int, total: int, peak: int, sharers: int) -> int:
    """Bytes for one rank's KV cache of a GPU that `sharers` ranks compute on; may be below 0.

    `free` of `total` bytes are free when all of them hold their weights and nothing else; steps take `peak` more.
    """
    share = (free - max(_SPARE_BYTES, total // _SPARE_PART)) // sharers
    return share - peak


def rehearsals(limits: EngineLimits, context_tokens: int, num_blocks: int) -> list[RunBatch]:
    """The largest steps: a prompt's last chunk, at the end of the longest context, and all sequences decoding.

    Their block tables name the blocks 0 to `num_blocks` over and over, so that a small cache will do.
    """
    count = min(limits.batch_tokens(), context_tokens)
    most = min(limits.max_sequences, limits.batch_tokens())
    prompt = [_chunk(0, context_tokens - count, count, limits.block_tokens, num_blocks)]
    decodes = [_chunk(index, context_tokens - 1, 1, limits.block_tokens, num_blocks) for index in range(most)]
    return [make_batch(0, chunks) for chunks in (prompt, decodes)]


def _chunk(index: int, start: int, count: int, block_tokens: int, num_blocks: int) -> Chunk:
    sequence = Sequence(Request(str(index), [0] * (start + count), _DEAREST), 0, index)
    sequence.block_table.extend(block % num_blocks for block in range(-(-(start + count) // block_tokens)))
    return Chunk(sequence, start, count, samples=True, scores_prompt=False)


def rehearse(stage: ParallelStage, geometry: KvGeometry, size: Rehearsed, devices: Devices) -> int:
    """Run the largest steps, twice, over a small cache: the bytes of the GPU that a step takes at most.

    Collective over the stage. The first round compiles kernels and lets libraries take what they keep.
    """
    num_blocks = -(-min(size.limits.batch_tokens(), size.context_tokens) // geometry.block_tokens) + 1
    runner = StageRunner(stage, KvCache(geometry, num_blocks, devices.device), devices)
    batches = rehearsals(size.limits, size.context_tokens, num_blocks)
    for batch in batches:
        runner.rehearse(batch, size.hidden)
    torch.cuda.synchronize(devices.device)
    torch.cuda.reset_peak_memory_stats(devices.device)
    held = torch.cuda.memory_allocated(devices.device)
    for batch in batches:
        runner.rehearse(batch, size.hidden)
    torch.cuda.synchronize(devices.device)
    return torch.cuda.max_memory_allocated(devices.device) - held


def free_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that are free, and all of them, after this process has given back what it does not hold."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)
