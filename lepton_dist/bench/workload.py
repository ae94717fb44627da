"""What the benchmark runs: prompts of random tokens, seeded, as requests."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import msgspec

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request

DECODES = {"decode b1": (1, 512), "decode b8": (8, 512), "decode b32": (32, 32)}
"""Cases of decoding: how many sequences, after how many tokens."""

SAMPLED = "sampled b8"
"""`decode b8` with sampled tokens: the difference is what sampling costs."""

CASES = ("prefill", *DECODES, "offline")
MORE_CASES = (SAMPLED,)
PEERS = ("transformers",)


@dataclass(frozen=True)
class Lengths:
    """Tokens of one request."""

    prompt: int
    output: int


def equal_lengths(count: int, prompt: int, output: int) -> list[Lengths]:
    """`count` requests alike."""
    return [Lengths(prompt, output)] * count


def offline_lengths(count: int = 64, seed: int = 0) -> list[Lengths]:
    """Lengths log-uniform: 16 to 512 tokens in, 8 to 128 out."""
    source = random.Random(seed)

    def draw(low: int, high: int) -> int:
        return round(math.exp(source.uniform(math.log(low), math.log(high))))

    return [Lengths(draw(16, 512), draw(8, 128)) for _ in range(count)]


def make_prompts(lengths: list[Lengths], vocab: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    source = random.Random(seed)
    return [[source.randrange(3, vocab) for _ in range(item.prompt)] for item in lengths]


def make_requests(lengths: list[Lengths], vocab: int, seed: int, *, is_sampled: bool = False) -> list[Request]:
    """Requests that run to their full length, greedy or sampled with a `top_p`."""
    sampling = SamplingParams(temperature=1.0 if is_sampled else 0.0, top_p=0.9, ignore_eos=True, seed=0)
    return [
        Request(f"{seed}/{index}", prompt, msgspec.structs.replace(sampling, max_tokens=item.output))
        for index, (prompt, item) in enumerate(zip(make_prompts(lengths, vocab, seed), lengths, strict=True))
    ]
