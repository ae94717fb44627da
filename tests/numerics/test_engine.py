"""The engine on a real (small, random) model: preemption, prefix reuse, samples, stops, and prompts that are scored.

A text may depend on none of them. Where two texts differ, the reference decides whether it was at a near tie.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request
from lepton_dist.errors import RequestError
from lepton_dist.text.tokenizer import Tokenizer
from tests.mpi.equality.cases import SAMPLINGS, prompt
from tests.mpi.equality.models import MODELS, VOCAB, make_model
from tests.mpi.equality.reference import NEAR_TIE, Reference, perturbed_scores
from tests.numerics.local_job import Ran, run_job

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "examples" / "tiny-stdlib"
BLOCK_TOKENS = 8
PLANS: Mapping[str, tuple[int, str]] = {
    "one": (1, "mesh: {tp: 1}"),
    "tp2": (2, "mesh: {tp: 2}"),
    "pp2": (2, "mesh: {pp: 2}"),
    "pp3": (3, "mesh: {pp: 3}"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(MODELS[0], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def with_limits(plan: str, **limits: Any) -> str:
    merged = {"block_tokens": BLOCK_TOKENS, "max_batch_tokens": 48, "max_sequences": 24, "step_timeout_s": 60, **limits}
    return f"{plan}\nengine: {json.dumps(merged)}\n"


def cache_bytes(num_blocks: int, *, num_layers: int = 4, kv_heads: int = 2) -> int:
    """Bytes of so many blocks on a rank of the first model: keys and values of head_dim 16 in float32."""
    return num_blocks * 2 * num_layers * BLOCK_TOKENS * kv_heads * 16 * 4


def mixed_requests(count: int) -> list[Request]:
    """Prompts of 1 to 60 tokens, outputs of 1 to 60, every kind of sampling; one in four shares a prefix of 24."""
    source = random.Random(11)
    requests = []
    for index in range(count):
        # Many short prompts with long outputs together take their blocks late, when none are left: that preempts.
        longest, most = ((60, 10), (8, 60))[index // 20 % 2]
        ids = prompt(f"mixed {index}", source.randint(1, longest))
        if index % 4 == 0:
            ids = prompt("shared", 24) + ids[:30]
        fields = SAMPLINGS[index % len(SAMPLINGS)]
        sampling = SamplingParams(**{**fields, "seed": index, "max_tokens": source.randint(1, most)})  # type: ignore[arg-type]
        requests.append(Request(str(index), ids, sampling))
    return requests


def assert_same_texts(first: Ran, second: Ran, requests: list[Request], reference: Reference) -> None:
    """Every text is the same up to a near tie; more than two of those would hide a fault."""
    num_near_ties = 0
    for request in requests:
        one, other = first.ids(request.key), second.ids(request.key)
        if one == other:
            continue
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        tokens = request.prompt + one[:at]
        with torch.inference_mode():
            logits = reference.model(torch.tensor([tokens])).logits[0, -1].double().numpy()
        scores = np.sort(perturbed_scores(logits, request.sampling, 0, tokens, len(request.prompt)))
        assert scores[-1] - scores[-2] < NEAR_TIE, f"request {request.key} differs at {at}: {one} and {other}"
        num_near_ties += 1
    assert num_near_ties <= 2


@pytest.fixture(scope="module")
def roomy(model: Path) -> Ran:
    """200 requests with a cache that holds them all."""
    ran = run_job(model, with_limits("mesh: {tp: 1}"), mixed_requests(200))
    assert ran.num_preemptions == 0
    return ran


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if ranks > 2 else []) for name, (ranks, _) in PLANS.items()]
)
def test_a_small_cache_changes_no_text(name: str, model: Path, roomy: Ran, reference: Reference) -> None:
    ranks, plan = PLANS[name]
    # 25 blocks of 8 tokens on each rank: about three of the 24 sequences that may run fit at their full length.
    size = cache_bytes(25, num_layers=2 if name == "pp2" else 4, kv_heads=1 if name == "tp2" else 2)
    if name == "pp3":
        size = cache_bytes(25, num_layers=2)  # of 2, 1 and 1 layers, so the first stage has the fewest blocks
    requests = mixed_requests(200)
    ran = run_job(model, with_limits(plan, kv_cache_bytes=size), requests, ranks=ranks)
    assert ran.num_blocks == 25
    assert ran.num_preemptions >= 10
    assert ran.num_free_blocks == ran.num_blocks, "blocks are lost"
    assert ran.num_unsent == 0, "the session was closed while activations were on their way"
    assert_same_texts(roomy, ran, requests, reference)
    for request in requests:
        completion = ran.outputs[request.key].completions[0]
        assert (len(completion.token_ids), completion.finish_reason) == (request.sampling.max_tokens, "length")


def test_prefix_reuse_changes_no_text(model: Path, roomy: Ran, reference: Reference) -> None:
    requests = mixed_requests(200)
    without = run_job(model, with_limits("mesh: {tp: 1}", prefix_cache=False), requests)
    assert without.num_reused_tokens == 0
    # 50 prompts begin with the same 24 tokens, three blocks; all but the first batch of them find these.
    assert roomy.num_reused_tokens >= 40 * 24
    assert_same_texts(roomy, without, requests, reference)


def test_samples_of_a_request(model: Path, reference: Reference) -> None:
    """Sample i of a request is the reference's sample i; together they are one output, in order."""
    sampling = SamplingParams(temperature=1.2, top_p=0.9, seed=-5, n=4, max_tokens=30)
    ids = prompt("samples", 21)
    for size in (None, cache_bytes(8)):
        limits = {} if size is None else {"kv_cache_bytes": size}
        requests = [Request(str(index), ids, sampling) for index in range(3)]
        ran = run_job(model, with_limits("mesh: {tp: 1}", **limits), requests)
        expected = [reference.sampled(ids, sampling, index) for index in range(4)]
        assert min(gap for one in expected for gap in one.gaps) > NEAR_TIE
        for key in "012":
            completions = ran.outputs[key].completions
            assert [completion.index for completion in completions] == [0, 1, 2, 3]
            assert [completion.token_ids for completion in completions] == [one.ids for one in expected]
        assert len({tuple(one.ids) for one in expected}) == 4
        assert (ran.num_preemptions > 0) == (size is not None)


def test_stop_tokens(model: Path, reference: Reference) -> None:
    ids = prompt("stop", 13)
    expected = reference.greedy(ids, 12).ids
    stop = next(token for token in expected[3:] if token not in expected[:3])
    at = expected.index(stop)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(stop,))
    last = msgspec.structs.replace(sampling, max_tokens=at + 1)
    ran = run_job(model, with_limits("mesh: {tp: 1}"), [Request("stop", ids, sampling), Request("both", ids, last)])
    for key in ("stop", "both"):  # a stop token that is also the last one allowed still counts as a stop
        completion = ran.outputs[key].completions[0]
        assert completion.token_ids == expected[: at + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_end_tokens(model: Path, reference: Reference, tmp_path: Path) -> None:
    """The model's own end token ends a text, and is generated like any other under ignore_eos."""
    ids = prompt("end", 13)
    expected = reference.greedy(ids, 12).ids
    end = next(token for token in expected[3:] if token not in expected[:3])
    directory = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eos_token_id": [end, VOCAB - 1]}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=12)
    ignoring = msgspec.structs.replace(sampling, ignore_eos=True)
    ran = run_job(
        directory, with_limits("mesh: {tp: 1}"), [Request("end", ids, sampling), Request("on", ids, ignoring)]
    )
    ended, went_on = ran.outputs["end"].completions[0], ran.outputs["on"].completions[0]
    assert ended.token_ids == expected[: expected.index(end) + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert (went_on.token_ids, went_on.finish_reason) == (expected, "length")


def test_stop_strings() -> None:
    """A stop string ends the text at the token that completes it, also where it lies across tokens."""
    tokenizer = Tokenizer.load(EXAMPLE)
    ids = tokenizer.encode("def read_file(path):\n")
    plan = with_limits("mesh: {tp: 1}", max_sequences=4, context_tokens=256)
    free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    whole = run_job(EXAMPLE, plan, [Request("free", ids, free)]).ids("free")
    text = tokenizer.decode(whole)
    stops = [text[start : start + 7] for start in (6, 20, 33)]
    requests = [Request(stop, ids, msgspec.structs.replace(free, stop=("never there", stop), n=2)) for stop in stops]
    ran = run_job(EXAMPLE, plan, requests)
    for stop in stops:
        shortest = next(count for count in range(1, 41) if stop in tokenizer.decode(whole[:count]))
        for completion in ran.outputs[stop].completions:
            assert completion.token_ids == whole[:shortest]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("name", ["one", "pp2"])
def test_prompt_logprobs_in_chunks_and_through_preemption(name: str, model: Path, reference: Reference) -> None:
    """Prompts longer than a batch, scored while blocks run out; shared prefixes must not leave positions out."""
    requests = []
    for index in range(24):
        ids = prompt("shared", 24) + prompt(f"scored {index}", 20 + index)
        sampling = SamplingParams(
            temperature=0.0, max_tokens=30, prompt_logprobs=index % 3, logprobs=2, n=1 + index % 2
        )
        requests.append(Request(str(index), ids, sampling))
    ranks, plan = PLANS[name]
    size = cache_bytes(22, num_layers=4 // ranks)
    ran = run_job(model, with_limits(plan, max_batch_tokens=20, kv_cache_bytes=size), requests, ranks=ranks)
    assert ran.num_preemptions > 5
    for request in requests:
        output = ran.outputs[request.key]
        ids = request.prompt + output.completions[0].token_ids
        with torch.inference_mode():
            exact = reference.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=1)
        found = output.prompt_logprobs
        assert found is not None and found[0] is None and len(found) == len(request.prompt)
        generated = output.completions[0].logprobs
        assert generated is not None and len(generated) == 30
        for position, entries in enumerate([*found[1:], *generated]):
            assert entries is not None
            wanted = 2 if position >= len(found) - 1 else int(request.key) % 3
            assert len(entries) == wanted + 1 and entries[0].token_id == ids[position + 1]
            assert [entry.rank for entry in entries[1:]] == list(range(1, wanted + 1))
            for entry in entries:
                # Logits reach 10, float32 sums of 60 to 93 terms in another order: a few 1e-6 each.
                assert abs(entry.logprob - float(exact[position, entry.token_id])) < 5e-5


def test_a_row_that_only_the_larger_replica_holds_runs_there(model: Path, reference: Reference) -> None:
    """Two ranks hold twice the tokens of one; what none can hold is refused."""
    plan = "replicas: [{stages: [{ranks: [0], layers: 4}]}, {stages: [{ranks: [1, 2], layers: 4}]}]"
    ids, sampling = prompt("large", 70), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    requests = [Request(str(index), ids, sampling) for index in range(3)]
    requests += [Request(f"small {index}", ids[:9], sampling) for index in range(6)]
    limits = with_limits(plan, kv_cache_bytes=cache_bytes(8))
    ran = run_job(model, limits, requests, ranks=3)
    assert ran.num_blocks == 8 and {ran.ids(str(index)) == reference.greedy(ids, 20).ids for index in range(3)} == {
        True
    }
    beyond = Request("beyond", ids, msgspec.structs.replace(sampling, max_tokens=80))
    with pytest.raises(RequestError, match="the cache of the largest replica holds 128"):
        run_job(model, limits, [beyond], ranks=3)
