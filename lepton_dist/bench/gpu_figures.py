"""The GPU's figures: ``python -m lepton_dist.bench.gpu_figures CASE`` prints one as JSON, for `launch/gpu-check`.

With ``--device cpu --shape tiny`` the same programs run without a GPU; their figures mean nothing then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import torch

from lepton_dist.bench.gpu_model import BLOCK_TOKENS, RandomModel
from lepton_dist.bench.gpu_peer import transformers_rate
from lepton_dist.bench.workload import make_requests, offline_lengths
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Scanner
from lepton_dist.engine.runner import BegunStep
from lepton_dist.errors import LeptonError
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.runtime.skeleton import decode_batch, prefill_batch
from lepton_dist.text.completion import RequestOutput

_WARM_UPS, _REPEATS = 3, 20
_OFFLINE_REQUESTS, _OFFLINE_SEQUENCES, _OFFLINE_TOKENS = 256, 64, 2048


class Measured(msgspec.Struct, frozen=True):
    """One figure: a share of a limit, or a ratio, and the numbers behind it in words."""

    value: float
    text: str


def median_s(call: Callable[[], object], device: str, repeats: int = _REPEATS) -> float:
    """Median seconds of a call that ends when its work on the GPU has ended."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(_WARM_UPS):
        timed()
    return statistics.median(timed() for _ in range(repeats))


def steady_s(begin: Callable[[], BegunStep], repeats: int = 5) -> float:
    """Median seconds of a step, where each begins before the one in front of it is back: so the engine orders them."""

    def per_step() -> float:
        begun, start = begin(), time.perf_counter()
        for _ in range(_REPEATS):
            following = begin()
            begun.result()
            begun = following
        seconds = time.perf_counter() - start
        begun.result()
        return seconds / _REPEATS

    per_step()
    return statistics.median(per_step() for _ in range(repeats))


def copy_bytes_per_s(device: str) -> float:
    """Bytes read plus written by copies of a large tensor."""
    count = (2 << 30) if device == "cuda" else (64 << 20)
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    return 2 * count / median_s(lambda: target.copy_(source), device)


def matmul_flops_per_s(device: str) -> float:
    """The peak of torch's bfloat16 product of large square matrices."""
    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * size**3 / median_s(lambda: a @ b, device))


def decode(shape: str, device: str, batch: int, context: int) -> Measured:
    """A decode step's bytes (weights and KV cache, read once) over its seconds, as a share of the copy bandwidth."""
    limit = copy_bytes_per_s(device)
    blocks = batch * -(-context // BLOCK_TOKENS)
    model = RandomModel.build(shape, device, num_blocks=blocks, most_sequences=batch, context=context)
    step = decode_batch(batch, context)
    seconds = steady_s(lambda: model.begin(step))
    moved = 2 * model.matmul_weights + batch * context * model.token_bytes
    rate = moved / seconds
    how = f"without graphs: {model.notice}" if model.notice else "captured"
    return Measured(
        rate / limit,
        f"{rate / limit:.1%}: {seconds * 1e3:.2f} ms a step, {batch / seconds:.0f} tokens/s, {rate / 1e9:.0f} of "
        f"{limit / 1e9:.0f} GB/s ({how})",
    )


def prefill(shape: str, device: str, tokens: int) -> Measured:
    """A prompt's operations over its seconds, as a share of the matmul peak; attention counts its causal half."""
    limit = matmul_flops_per_s(device)
    blocks = -(-tokens // BLOCK_TOKENS)
    model = RandomModel.build(shape, device, num_blocks=blocks, most_sequences=1, context=tokens)
    step = prefill_batch(tokens)
    seconds = median_s(lambda: model.begin(step).result(), device, repeats=5)
    sizes = model.config.shape
    attention = 2 * tokens * (tokens + 1) * sizes.num_heads * sizes.head_dim * (sizes.num_layers - 1)
    # The end of the last layer and the head are computed for the last token only.
    last = model.last_weights + model.head_weights
    flops = 2 * tokens * (model.matmul_weights - last) + 2 * last + attention
    rate = flops / seconds
    return Measured(
        rate / limit,
        f"{rate / limit:.1%}: {tokens / seconds:.0f} tokens/s, {rate / 1e12:.0f} of {limit / 1e12:.0f} Tflop/s",
    )


def run_to_the_end(engine: Engine, begin: Callable[[RunBatch], BegunStep]) -> dict[str, RequestOutput]:
    """Every step that the engine asks for, as many in flight as it has room for; the outputs by request."""
    begun: deque[BegunStep] = deque()
    outputs: dict[str, RequestOutput] = {}
    while True:
        batch = engine.next_batch() if engine.has_room else None
        if batch is not None:
            begun.append(begin(batch))
        elif begun:
            outputs.update(engine.apply(begun.popleft().result()))
        else:
            return outputs


def ours_per_s(shape: str, device: str, requests: int) -> float:
    """Tokens/s of output of an offline batch: the engine and its scheduler, in one process."""
    lengths = offline_lengths(requests)
    longest = max(item.prompt + item.output for item in lengths)
    limits = EngineLimits(max_sequences=_OFFLINE_SEQUENCES, max_batch_tokens=_OFFLINE_TOKENS, prefix_cache=False)
    blocks = _OFFLINE_SEQUENCES * -(-longest // BLOCK_TOKENS)
    model = RandomModel.build(shape, device, num_blocks=blocks, most_sequences=_OFFLINE_SEQUENCES, context=longest)
    seconds = 0.0
    for turn in (0, 1):  # the first warms up
        engine = Engine(limits, blocks, 1, (), _no_scanner, ahead=1)
        for request in make_requests(lengths, model.config.shape.vocab, seed=turn):
            engine.add(request)
        start = time.perf_counter()
        run_to_the_end(engine, model.begin)
        seconds = time.perf_counter() - start
        if engine.has_work:
            raise LeptonError("the engine stopped with work left: the KV cache of the offline batch is too small")
    return sum(item.output for item in lengths) / seconds


def offline(shape: str, device: str, requests: int) -> Measured:
    """Our tokens/s over transformers' continuous batching, each in its turn on the same device and workload."""
    ours = ours_per_s(shape, device, requests)
    if device == "cuda":
        torch.cuda.empty_cache()
    theirs = transformers_rate(shape, device, offline_lengths(requests))
    return Measured(ours / theirs, f"{ours / theirs:.2f} times: {ours:.0f} against {theirs:.0f} tokens/s of output")


def _no_scanner(stops: tuple[str, ...], _preceding: list[int]) -> Scanner:
    raise LeptonError(f"no request of this batch has stop strings, but these came: {stops}")


def main(arguments: Sequence[str]) -> int:
    """Measure the named case."""
    parser = argparse.ArgumentParser(prog="python -m lepton_dist.bench.gpu_figures")
    parser.add_argument("case", choices=("decode", "prefill", "offline"))
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=_OFFLINE_REQUESTS)
    chosen = parser.parse_args(arguments)
    if chosen.case == "decode":
        found = decode(chosen.shape, chosen.device, chosen.batch, chosen.context)
    elif chosen.case == "prefill":
        found = prefill(chosen.shape, chosen.device, chosen.context)
    else:
        found = offline(chosen.shape, chosen.device, chosen.requests)
    print(msgspec.json.encode(found).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
