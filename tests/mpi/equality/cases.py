"""Which requests and plans the equality tests run, and the files through which pytest and the job talk."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec

from lepton_dist.config.sampling import SamplingParams
from tests.mpi.equality.models import VOCAB

# Ranks -> name -> the plan without its engine.
PLANS: Mapping[int, Mapping[str, str]] = {
    1: {"one": "mesh: {tp: 1}"},
    2: {
        "tp2": "mesh: {tp: 2}",
        "pp2": "mesh: {pp: 2}",
        "dp2": "mesh: {dp: 2}",
        "shares": "replicas: [{stages: [{ranks: [0, 1], shares: [2, 1]}]}]",
    },
    3: {
        "tp3": "mesh: {tp: 3}",
        "pp3": "mesh: {pp: 3}",
        "uneven": "replicas: [{stages: [{ranks: [2, 0], layers: 3}, {ranks: [1], layers: 1}]}]",
    },
    4: {
        "tp4": "mesh: {tp: 4}",
        "tp2-pp2": "mesh: {tp: 2, pp: 2}",
        "dp2-tp2": "mesh: {dp: 2, tp: 2}",
    },
}
# Longer than a prefill chunk of 16 or 32 tokens, than the sliding windows (9 and 11), and than longrope's original 48.
PROMPT_LENGTHS = (1, 7, 17, 33, 45, 70)
GREEDY_TOKENS = 12
SAMPLED_TOKENS = 10
BATCH_SIZES = (1, 7, 64)
# One of each filter and penalty, alone and together.
SAMPLINGS: tuple[Mapping[str, float], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "frequency_penalty": -0.5},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 1.0},
    {"temperature": 2.0, "top_k": 1000, "top_p": 0.999},
)


class Case(msgspec.Struct):
    """One request, and what is expected of its first sample."""

    name: str
    prompt: list[int]
    sampling: SamplingParams
    ids: list[int]
    gaps: list[float]


class Opening(msgspec.Struct):
    """One session: a model under a plan, and the requests to run in it."""

    name: str
    model: str
    plan: str
    dtype: str
    cases: list[Case]


class Difference(msgspec.Struct):
    """Where a text left the expected one, not at a near tie."""

    opening: str
    case: str
    position: int
    expected: list[int]
    found: list[int]


class Outcome(msgspec.Struct):
    """What a job found: tokens compared, near ties at which the text legitimately differed, and real differences."""

    num_tokens: int = 0
    num_near_ties: int = 0
    differences: list[Difference] = []


def prompt(name: str, length: int) -> list[int]:
    """Random ids, the same for the same name and length."""
    source = random.Random(f"{name} {length}")
    return [source.randrange(VOCAB) for _ in range(length)]


def with_engine(plan: str, *, max_sequences: int = 64, max_batch_tokens: int = 16, block_tokens: int = 8) -> str:
    """The plan as YAML with these limits."""
    limits = f"max_sequences: {max_sequences}, max_batch_tokens: {max_batch_tokens}, block_tokens: {block_tokens}"
    return f"{plan}\nengine: {{{limits}, step_timeout_s: 60, load_timeout_s: 60}}\n"
