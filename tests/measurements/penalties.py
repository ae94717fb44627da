"""What penalties add to a step of 64 sequences, 2,048 tokens each: ``python -m tests.measurements.penalties``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec
import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.transport import Links
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.penalties import open_penalties
from lepton_dist.engine.request import Request
from lepton_dist.engine.runner import StepResult
from lepton_dist.engine.sampler import VocabShard, sample
from lepton_dist.plan.plan import EngineLimits

ROWS, HISTORY, STEPS = 64, 2048, 25
Sample = Callable[[torch.Tensor, RunBatch], torch.Tensor]


def sampler(vocab: int) -> Sample:
    """A last stage's choice of tokens, without a model."""
    shard = VocabShard(0, vocab, vocab, Group("alone", [0], 0, Links()))
    penalties = open_penalties(0, vocab, torch.device("cpu"))
    return lambda logits, batch: sample(logits, batch.samples, shard, penalties)


def measured(vocab: int, choose: Sample, is_text: bool, **penalties: float) -> tuple[float, float, int]:
    """Median milliseconds of making a command and of choosing its tokens, and the bytes of the command.

    The tokens of prompts are uniform, so that nearly all are distinct, or log-uniform, about as in text.
    """
    limits = EngineLimits(max_sequences=ROWS, max_batch_tokens=ROWS * HISTORY, prefix_cache=False)

    def no_scanner(*_: object) -> None:
        raise ValueError("no request has stop strings")

    engine = Engine(limits, ROWS * 140, 1, (), no_scanner)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for index in range(ROWS):
        uniform = torch.rand(HISTORY, generator=generator)
        prompt = ((vocab**uniform if is_text else vocab * uniform).long().clamp(max=vocab - 1)).tolist()
        engine.add(Request(str(index), prompt, SamplingParams(max_tokens=90, temperature=0.0, **penalties)))
    logits = torch.randn(ROWS, vocab, generator=generator)
    making: list[float] = []
    choosing: list[float] = []
    num_bytes = 0
    for _ in range(STEPS):
        start = time.thread_time()
        batch = engine.next_batch()
        making.append(time.thread_time() - start)
        assert batch is not None
        num_bytes = len(msgspec.msgpack.encode(batch))
        mine = logits.clone()
        start = time.thread_time()
        tokens = choose(mine, batch)
        choosing.append(time.thread_time() - start)
        engine.apply(StepResult(batch.step, tokens.int().numpy().tobytes(), {}, []))
    return 1000 * statistics.median(making), 1000 * statistics.median(choosing), num_bytes


if __name__ == "__main__":
    torch.set_num_threads(1)
    fields = {"repetition_penalty": 1.05, "frequency_penalty": 0.1}
    cases = (("no penalties", False, {}), ("penalties", False, fields), ("penalties, as in text", True, fields))
    for vocab in (32_000, 152_064):
        for name, is_text, given in cases:
            making_ms, choosing_ms, num_bytes = measured(vocab, sampler(vocab), is_text, **given)
            print(
                f"vocabulary {vocab}, {name}: next_batch() {making_ms:.2f} ms, sample() {choosing_ms:.2f} ms, "
                f"command {num_bytes / 1024:.0f} KiB"
            )
