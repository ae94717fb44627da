"""What an int8 wire costs the embedded model in quality: log-probabilities and perplexity of its own texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lepton_dist.comm import world as world_module
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transports.local import Hub
from lepton_dist.comm.world import World
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request
from lepton_dist.text.tokenizer import Tokenizer
from tests.numerics.local_job import run_job

EXAMPLES = Path(__file__).resolve().parents[2] / "configs" / "examples"
MODEL = EXAMPLES / "tiny-stdlib"
PLAIN = "mesh: {tp: 1}\nprecision: {weights: float32}\n"
OUTPUT_TOKENS = 48


@pytest.fixture(autouse=True)
def every_rank_on_a_node_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums inside a node do not use the wire."""
    make = world_module._worlds_at

    def spread(hub: Hub, size: int, patience: Patience | None) -> list[World]:
        worlds = make(hub, size, patience)
        for one in worlds:
            one.nodes = tuple(range(size))
        return worlds

    monkeypatch.setattr(world_module, "_worlds_at", spread)


def requests(outputs: dict[str, list[int]] | None = None) -> list[Request]:
    """The example prompts: to be continued, or, with their continuations, to be scored."""
    tokenizer = Tokenizer.load(MODEL)
    made = []
    for line in (EXAMPLES / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        key, ids = str(row["id"]), tokenizer.encode(row["prompt"])
        if outputs is None:
            made.append(Request(key, ids, SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)))
        else:
            sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            made.append(Request(key, ids + outputs[key], sampling))
    return made


@pytest.fixture(scope="module")
def exact() -> dict[str, list[int]]:
    """The greedy texts of one rank in float32."""
    ran = run_job(MODEL, PLAIN, requests())
    return {key: ran.ids(key) for key in ran.outputs}


def scores(plan: str, ranks: int, texts: dict[str, list[int]]) -> np.ndarray:
    ran = run_job(MODEL, plan, requests(texts), ranks=ranks, dtype=None)  # the plan decides
    outputs = [ran.outputs[key] for key in sorted(ran.outputs)]
    return np.array([entries[0].logprob for output in outputs for entries in output.prompt_logprobs[1:]])


@pytest.mark.parametrize("mesh", ["pp: 2", "tp: 2", "tp: 4", "pp: 2, tp: 2"])
def test_log_probabilities_and_perplexity_stay_close(mesh: str, exact: dict[str, list[int]]) -> None:
    ranks = int(np.prod([int(part.split(":")[1]) for part in mesh.split(",")]))
    plain = scores(PLAIN, 1, exact)
    packed = scores(f"mesh: {{{mesh}}}\nprecision: {{weights: float32, wire: int8}}\n", ranks, exact)
    assert not np.array_equal(packed, plain)
    assert np.abs(packed - plain).mean() < 0.02
    assert abs(np.exp(plain.mean() - packed.mean()) - 1) < 0.005
