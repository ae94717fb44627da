"""Hugging Face transformers under the benchmark's workload: the yardstick that everybody has at hand.

Runs in a process of its own (``python -m lepton_dist.bench.peer ORDER``), with as many threads as our ranks together.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from lepton_dist.bench.measure import Figure
from lepton_dist.bench.memory import own_peak
from lepton_dist.bench.workload import DECODES, Lengths, equal_lengths, make_prompts, offline_lengths
from lepton_dist.errors import LeptonError

# transformers batches statically: rows of like length go together, which is the best that it can do.
_OFFLINE_ROWS = 16


class PeerOrder(msgspec.Struct):
    """What the peer's process shall measure."""

    model: str
    cases: list[str]
    repeats: int
    output_tokens: int
    threads: int


def missing_peer(name: str) -> str | None:
    """Why a peer cannot run here; None when it can."""
    return None if importlib.util.find_spec(name) else f"--peer {name} is skipped: it is not installed (pip install)"


def measure_peer(order: PeerOrder, meanwhile: Callable[[], object]) -> list[Figure]:
    """Figures of transformers; `meanwhile` is called again and again until they are there.

    Raises:
        LeptonError: the peer failed.
    """
    command = [sys.executable, "-m", "lepton_dist.bench.peer", msgspec.json.encode(order).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            meanwhile()
        assert process.stdout is not None  # it was asked for above
        output = process.stdout.read()
    if process.returncode:
        raise LeptonError(f"--peer: transformers ended with {process.returncode}; its errors stand above")
    return msgspec.json.decode(output, type=list[Figure])


class Transformers:
    """A model in transformers, with greedy decoding over its own KV cache."""

    def __init__(self, order: PeerOrder) -> None:
        torch.set_num_threads(order.threads)
        self._order = order
        self._memory = own_peak()
        self._memory.reset()
        start = time.perf_counter()
        self._model = _load(order.model)
        seconds = time.perf_counter() - start
        self.load = Figure("load", seconds, seconds, seconds, "s", peak_bytes=self._memory.bytes())
        self._num_runs = 0
        self._run(equal_lengths(2, 32, 4))

    def case(self, name: str) -> Figure:
        """The figure of one case."""
        self._memory.reset()
        values = [self._once(name) for _ in range(self._order.repeats)]
        middle = statistics.median(values)
        return Figure(name, middle, min(values), max(values), "tokens/s", None, self._memory.bytes())

    def _once(self, name: str) -> float:
        if name == "prefill":
            return 512 / sum(self._run(equal_lengths(1, 512, 1)))
        if name == "offline":
            rows = sorted(offline_lengths(), key=lambda item: (item.output, item.prompt))
            batches = [rows[first : first + _OFFLINE_ROWS] for first in range(0, len(rows), _OFFLINE_ROWS)]
            return sum(row.output for row in rows) / sum(sum(self._run(batch)) for batch in batches)
        count, context = DECODES[name]
        _, decode_s = self._run(equal_lengths(count, context, 1 + self._order.output_tokens))
        return count * self._order.output_tokens / decode_s

    @torch.inference_mode()
    def _run(self, lengths: list[Lengths]) -> tuple[float, float]:
        """Seconds of the prefill and of the decoding, to the largest output of the batch."""
        self._num_runs += 1
        ids, mask = _padded(make_prompts(lengths, self._model.config.vocab_size, self._num_runs))
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        start = time.perf_counter()
        cache = None
        first_s = 0.0
        for index in range(max(item.output for item in lengths)):
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            mask, positions = torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
            if index == 0:
                first_s = time.perf_counter() - start
        return first_s, time.perf_counter() - start - first_s


def _load(model: str) -> Any:
    """The model, ready to run: transformers has no types worth naming."""
    from transformers import AutoModelForCausalLM  # a second of import, paid in this process only

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")  # in evaluation mode already


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask int64 [rows, longest], padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def main(text: str) -> None:
    """Measure what the order asks for, and print the figures as JSON."""
    order = msgspec.json.decode(text, type=PeerOrder)
    peer = Transformers(order)
    figures = [peer.load, *(peer.case(name) for name in order.cases)]
    sys.stdout.buffer.write(msgspec.json.encode(figures))


if __name__ == "__main__":
    main(sys.argv[1])
