"""Decode steps of the 160m shape in bfloat16, quiet, and with a busy process bound to each core of this process.

`taskset -c 0,1 python -m tests.measurements.busy_cores [BATCH [SECONDS]]`
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch

import lepton_dist  # noqa: F401  # before torch: it says how long torch's threads spin
from lepton_dist.kernels.activations import ACTIVATIONS
from lepton_dist.kernels.attention import PagedBatch
from lepton_dist.kernels.cpu.matmul import PanelWeight
from lepton_dist.kernels.row_maxima import row_maxima
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.model.layers import Attention, Linear, Mlp, Norm, unreduced
from tests.unit.kernels.paged import random_batch

HIDDEN, HEADS, HEAD_DIM, FFN, VOCAB, LAYERS, CONTEXT = 768, 12, 64, 2048, 32_000, 12, 128
SPIN = [sys.executable, "-c", "while True: pass"]


class Steps:
    """Layers and head with random weights, and a batch of one token a sequence."""

    def __init__(self, batch: int) -> None:
        self.layers = [self._layer() for _ in range(LAYERS)]
        self.head = self._linear(VOCAB, HIDDEN)
        keys, values, self.batch = random_batch([(1, CONTEXT)] * batch, HEADS, HEAD_DIM, 16, torch.bfloat16)
        self.caches = [(keys.clone(), values.clone()) for _ in range(LAYERS)]
        self.angles = torch.rand(batch, 1, HEAD_DIM // 2)
        self.rows = batch

    def step(self) -> None:
        paged = PagedBatch(self.batch.slots, self.batch.spans, self.batch.tables)
        hidden, delta = torch.randn(self.rows, HIDDEN), None
        for layer, cache in zip(self.layers, self.caches, strict=True):
            assert layer.native is not None
            mixed = layer.native.attention(hidden, delta, (self.angles, self.angles), cache, paged)
            delta = layer.native.mlp(hidden, mixed)
        row_maxima(self.head.weight.matmul(hidden.bfloat16(), torch.float32))

    def tokens_per_s(self, seconds: float) -> float:
        for _ in range(5):
            self.step()
        start_s, steps = time.perf_counter(), 0
        while time.perf_counter() - start_s < seconds:
            self.step()
            steps += 1
        return steps * self.rows / (time.perf_counter() - start_s)

    def _linear(self, out: int, dim: int) -> Linear:
        return Linear(PanelWeight.of((torch.randn(out, dim) / dim**0.5).bfloat16(), "bfloat16"), None, unreduced)

    def _layer(self) -> DecoderLayer:
        norms = [Norm(torch.rand(HIDDEN) + 0.5, None, 1e-5, torch.bfloat16) for _ in range(2)]
        qkv, output = self._linear(3 * HEADS * HEAD_DIM, HIDDEN), self._linear(HIDDEN, HEADS * HEAD_DIM)
        attention = Attention(qkv, None, None, output, HEAD_DIM, None)
        mlp = Mlp(self._linear(2 * FFN, HIDDEN), self._linear(HIDDEN, FFN), ACTIVATIONS["silu"], is_gated=True)
        return make_layer(norms[0], attention, norms[1], mlp, HEAD_DIM)


@torch.inference_mode()
def main() -> None:
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    cores = sorted(os.sched_getaffinity(0))
    for threads in {1, len(cores)}:
        torch.set_num_threads(threads)
        steps = Steps(batch)
        quiet = steps.tokens_per_s(seconds)
        others = [subprocess.Popen(["taskset", "-c", str(core), *SPIN]) for core in cores]
        try:
            busy = steps.tokens_per_s(seconds)
        finally:
            for other in others:
                other.kill()
                other.wait()
        print(f"{threads} thread(s), batch {batch}: {quiet:.0f} tokens/s, busy {busy:.0f}: {busy / quiet:.2f}")


if __name__ == "__main__":
    main()
