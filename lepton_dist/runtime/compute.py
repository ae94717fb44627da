"""How fast this rank computes, for the cost model: measured while the other ranks of its node measure the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle

import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.launcher import is_rationed
from lepton_dist.engine.batch import RunBatch
from lepton_dist.kernels.linear import Weight, make_weight
from lepton_dist.runtime.facts import ComputeFacts, ReduceCurve
from lepton_dist.runtime.skeleton import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    EngineLoop,
    Skeleton,
    decode_batch,
    prefill_batch,
)

WIDTHS = (1, 8, 32, 128, 512)
KINDS = ("bfloat16", "float32", "int8", "int4")
REDUCE_BYTES = (2 << 10, 16 << 10, 128 << 10, 1 << 20, 4 << 20)
# An MLP's matrices [out, in]; together with their copies they are larger than the caches of a node.
_MATRICES = ((4096, 1024), (1024, 4096))
_WEIGHTS = 4096 * 1024
_NODE_BYTES, _LEAST_BYTES = 512 << 20, 64 << 20
# A machine that others use is slow for seconds at a time: all is measured in turn, several times over.
_PASSES, _SECONDS_AN_ITEM = 3, 0.08
_MOST_CALLS = 200
_CACHED_BYTES, _LEAST_CACHED_BYTES = 256 << 20, 32 << 20
_SEQUENCES, _PROMPT, _VOCAB = 32, 512, 32768
_LAYERS = (2, 8)
_SCALARS = tuple(name for name in ComputeFacts.__struct_fields__ if name != "matmul")


def measure_compute(node: Group, alone: Group, kinds: Sequence[str] = KINDS) -> ComputeFacts:
    """Rates and overheads of this rank, in some twenty seconds; collective over the group of its node.

    `kinds` are those of weights, all that there are by default.

    Raises:
        RankLostError: a rank of the node did not come in time.
    """
    passes = [_measured_once(node, alone, kinds) for _ in range(_PASSES)]
    matmul = {kind: _middle_curve([one.matmul[kind] for one in passes]) for kind in kinds}
    rest = {name: statistics.median(getattr(one, name) for one in passes) for name in _SCALARS}
    return ComputeFacts(matmul=matmul, **rest)


def _measured_once(node: Group, alone: Group, kinds: Sequence[str]) -> ComputeFacts:
    matmul = {kind: _matmul_rates(node, kind) for kind in kinds}
    overheads = _overheads(node, alone)
    return ComputeFacts(memory_bytes_per_s=_memory_rate(node), matmul=matmul, **overheads)


def _middle_curve(curves: Sequence[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The median rate of each width."""
    return [(points[0][0], statistics.median(rate for _, rate in points)) for points in zip(*curves, strict=True)]


def measure_reduce(group: Group, name: str) -> ReduceCurve:
    """Seconds of all-reduces over a group, the slowest rank's; collective over the group."""
    points = []
    for num_bytes in REDUCE_BYTES:
        tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
        reduce = partial(group.all_reduce, tensor)
        reduce()
        once = _agreed(group, _timed(reduce))
        calls = int(min(max(_SECONDS_AN_ITEM / once, 3), _MOST_CALLS))
        median = statistics.median(_timed(reduce) for _ in range(calls))
        points.append((num_bytes, _agreed(group, median)))
    return ReduceCurve(name, group.size, points)


def _agreed(group: Group, seconds: float) -> float:
    return float(group.all_reduce(torch.tensor([max(seconds, 1e-7)], dtype=torch.float64), op="max")[0])


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_of(node: Group, call: Callable[[], object]) -> float:
    """Seconds of a call in the median, while the other ranks of the node do the same.

    The mean under a quota: of calls that are shorter than its period most run at full speed, and a few stand still.
    """
    call()
    node.barrier()
    end = time.perf_counter() + _SECONDS_AN_ITEM
    times = [_timed(call), _timed(call)]
    while time.perf_counter() < end and len(times) < _MOST_CALLS:
        times.append(_timed(call))
    return statistics.fmean(times) if is_rationed() else statistics.median(times)


def _memory_rate(node: Group) -> float:
    num_bytes = max(_NODE_BYTES // node.size, _LEAST_BYTES)
    values = torch.ones(num_bytes // 4)
    return num_bytes / _seconds_of(node, values.sum)


def _matmul_rates(node: Group, kind: str) -> list[tuple[int, float]]:
    """Flops/s at each width, over matrices that come from memory each time."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    copies = max(_NODE_BYTES // node.size, _LEAST_BYTES) // (_WEIGHTS * 2)
    plain = [torch.randn(extents).mul_(0.02).to(dtype) for extents in _MATRICES]
    weights = [make_weight(plain[index % 2].clone(), kind) for index in range(copies // 2 * 2)]
    rates = []
    for width in WIDTHS:
        inputs = [torch.randn(width, extents[1]).to(dtype) for extents in _MATRICES]
        turns = cycle(range(0, len(weights), 2))
        rates.append((width, 4 * _WEIGHTS * width / _seconds_of(node, partial(_multiply, weights, inputs, turns))))
    return rates


def _multiply(weights: list[Weight], inputs: list[torch.Tensor], turns: Iterator[int]) -> None:
    """Two matmuls as of an MLP, with the weights whose turn it is."""
    index = next(turns)
    weights[index].matmul(inputs[0])
    weights[index + 1].matmul(inputs[1])


def _overheads(node: Group, alone: Group) -> dict[str, float]:
    """Attention, and what a step takes beside attention and matmuls."""
    context = max(_CACHED_BYTES // node.size, _LEAST_CACHED_BYTES) // (_SEQUENCES * _LAYERS[1] * _token_bytes())
    few = Skeleton.build(alone, _LAYERS[0], 64, _SEQUENCES)
    many = Skeleton.build(alone, _LAYERS[1], 64, _SEQUENCES * max(context // 16, 2))
    wide = Skeleton.build(alone, _LAYERS[1], _VOCAB, _SEQUENCES)
    layers = cycle(range(_LAYERS[1]))
    one, several, prompt = decode_batch(1, 16), decode_batch(_SEQUENCES, 16), prefill_batch(_PROMPT)
    cached = decode_batch(_SEQUENCES, context)

    def step_s(skeleton: Skeleton, batch: RunBatch) -> float:
        return _seconds_of(node, lambda: skeleton.step(batch))

    attend_s = _seconds_of(node, lambda: many.attend(cached, next(layers)))
    prefill_s = _seconds_of(node, lambda: many.attend(prompt, 0))
    pairs = _PROMPT * (_PROMPT + 1) // 2
    shallow, deep = step_s(few, one), step_s(many, one)
    a_layer = max(deep - shallow, 0.0) / (_LAYERS[1] - _LAYERS[0])
    whole = _LAYERS[1] - 1  # layers that all of the prompt goes through: its last token alone ends the last
    element = max(step_s(many, prompt) - deep - whole * prefill_s, 0.0) / (_PROMPT * whole * HIDDEN)
    some, fewer = step_s(many, several), step_s(few, several)
    # What one more sequence takes in few layers and in many: a part of it in each layer.
    more, most = ((end - start) / (_SEQUENCES - 1) for start, end in ((shallow, fewer), (deep, some)))
    in_a_layer = max(most - more, 0.0) / (_LAYERS[1] - _LAYERS[0])
    sequence = more - _LAYERS[0] * in_a_layer
    logit = max(step_s(wide, several) - some, 0.0) / (_SEQUENCES * (_VOCAB - 64))
    loop, loops = (_seconds_of(node, EngineLoop(count).step) for count in (1, _SEQUENCES))
    engine = max(loops - loop, 0.0) / (_SEQUENCES - 1)
    tiny = make_weight(torch.zeros(64, 64, dtype=torch.bfloat16))
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    call_s = _seconds_of(node, lambda: tiny.matmul(x))
    return {
        "attention_bytes_per_s": _SEQUENCES * context * _token_bytes() / attend_s,
        "attention_flops_per_s": 4 * pairs * HEADS * HEAD_DIM / prefill_s,
        "step_s": max(shallow - _LAYERS[0] * a_layer, 0.0) + loop,
        "layer_s": a_layer + 4 * call_s,
        "sequence_s": max(sequence, 0.0) + engine,
        "kv_head_s": max(in_a_layer - HIDDEN * element, 0.0) / KV_HEADS,
        "element_s": element,
        "logit_s": logit,
    }


def _token_bytes() -> int:
    """Bytes of one token's keys and values in one layer of the skeleton."""
    return 2 * KV_HEADS * HEAD_DIM * torch.bfloat16.itemsize
