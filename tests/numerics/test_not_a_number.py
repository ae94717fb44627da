"""A token whose embedding is NaN fails the rows that meet it, and no other: under every plan, wherever it comes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from lepton_dist.bench.gpu_figures import run_to_the_end
from lepton_dist.bench.gpu_model import BLOCK_TOKENS, RandomModel
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Request, Scanner
from lepton_dist.errors import CheckpointError
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.text.completion import RequestOutput
from tests.mpi.equality.cases import prompt
from tests.mpi.equality.models import MODELS, make_model
from tests.mpi.equality.reference import Reference
from tests.numerics.local_job import Ran, run_job
from tests.numerics.test_engine import assert_same_texts, cache_bytes, mixed_requests, with_limits

PLANS: Mapping[str, tuple[int, str, int]] = {  # ranks, mesh, layers and KV heads of a rank together
    "one": (1, "mesh: {tp: 1}", 8),
    "tp2": (2, "mesh: {tp: 2}", 4),
    "pp2": (2, "mesh: {pp: 2}", 4),
    "dp2": (2, "mesh: {dp: 2}", 8),
}


def spoil(model: Path, target: Path, name: str, row: int) -> Path:
    """A copy of a checkpoint in which a row of a tensor is no number."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name][row] = torch.nan
            save_file(tensors, file, {"format": "pt"})
            return target
    raise AssertionError(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(MODELS[0], tmp_path_factory.mktemp("model"))


def workload() -> list[Request]:
    """Every kind of sampling; shared prefixes, several samples, prompts that are scored."""
    requests = mixed_requests(60)
    shared = prompt("shared", 24)
    for index in range(12):
        fields = {"n": 1 + index % 3, "prompt_logprobs": 1 if index % 4 == 3 else None, "logprobs": 1}
        sampling = SamplingParams(temperature=0.8 * (index % 2), seed=index, max_tokens=12, **fields)
        requests.append(Request(f"more {index}", shared + prompt(f"more {index}", 3 + index), sampling))
    return requests


def drawn(ran: Ran, request: Request) -> list[list[int]]:
    return [one.token_ids for one in ran.outputs[request.key].completions]


@pytest.fixture(scope="module")
def sound(model: Path) -> Ran:
    return run_job(model, with_limits("mesh: {tp: 1}"), workload())


@pytest.fixture(scope="module")
def broken_token(sound: Ran) -> int:
    """A token that some rows draw in the middle of their outputs, one of several samples among them, and most never."""
    counts: dict[int, int] = {}
    for request in workload():
        for ids in drawn(sound, request):
            for token in set(ids[1:-1]):
                counts[token] = counts.get(token, 0) + 1 + 10 * (request.sampling.n > 1)
    return min(token for token, count in counts.items() if 13 <= count < 40)


@pytest.mark.parametrize("name", PLANS)
def test_only_the_rows_that_meet_it_fail(name: str, model: Path, sound: Ran, broken_token: int, tmp_path: Path) -> None:
    ranks, mesh, size = PLANS[name]
    spoilt = spoil(model, tmp_path / "spoilt", "model.embed_tokens.weight", broken_token)
    requests = workload()
    # In the prompt: at its end, at its beginning, and in the middle behind a prefix that others share.
    extra = [
        Request("end", [*prompt("shared", 24), 5, broken_token], SamplingParams(seed=1, max_tokens=3)),
        Request("begin", [broken_token, *prompt("begin", 9)], SamplingParams(seed=1, max_tokens=3, n=2)),
        Request("middle", [*prompt("shared", 24), broken_token, 7, 8], SamplingParams(temperature=0.0, max_tokens=3)),
        Request("scored", [3, broken_token, 7], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)),
    ]
    plan = with_limits(mesh, kv_cache_bytes=cache_bytes(30, num_layers=size, kv_heads=1))
    ran = run_job(spoilt, plan, [*extra, *requests], ranks=ranks)
    assert ran.num_free_blocks == ran.num_blocks == 30, "blocks are lost"

    def meets(request: Request) -> bool:
        return broken_token in request.prompt or any(broken_token in ids[:-1] for ids in drawn(sound, request))

    failed = {request.key for request in requests if meets(request)} | {request.key for request in extra}
    assert {key for key, output in ran.outputs.items() if output.failure} == failed
    assert {key for key, output in ran.outputs.items() if not output.completions} == failed
    assert len(failed) >= 6 and any(request.sampling.n > 1 for request in requests if request.key in failed)
    assert "after the prompt" in ran.outputs["end"].failure
    rest = [request for request in requests if request.key not in failed and request.sampling.n == 1]
    assert len(rest) > 30
    assert_same_texts(sound, ran, rest, Reference(model))


@pytest.mark.parametrize("name", ["one", "tp2", "dp2"])
def test_a_model_without_any_numbers_is_broken_itself(name: str, model: Path, tmp_path: Path) -> None:
    """No row has failed then; the error names the tensor, whether the rows are many, or one that meets nothing else."""
    spoilt = spoil(model, tmp_path / "spoilt", "model.layers.1.input_layernorm.weight", 17)
    ranks, mesh, _ = PLANS[name]
    for count in (1, 60):
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight.*\[17\]"):
            run_job(spoilt, with_limits(mesh), workload()[-count:], ranks=ranks)


def test_one_row_that_fails_says_nothing_of_the_model(model: Path, tmp_path: Path) -> None:
    spoilt = spoil(model, tmp_path / "spoilt", "model.embed_tokens.weight", 9)
    ran = run_job(spoilt, with_limits("mesh: {tp: 1}"), [Request("row", [9, 3], SamplingParams(max_tokens=3))])
    assert ran.outputs["row"].failure


def test_steps_that_run_ahead() -> None:
    """The step behind the one that fails is under way: its token counts for nothing, the other rows' for what it is."""
    torch.manual_seed(0)
    tiny = RandomModel.build("tiny", "cpu", num_blocks=64, most_sequences=8, context=128, dtype=torch.float32)
    sampling = SamplingParams(max_tokens=20, temperature=1.0)
    requests = [
        Request(str(index), [index + 1, 2, 3], msgspec.structs.replace(sampling, seed=index)) for index in range(6)
    ]

    limits = EngineLimits(block_tokens=BLOCK_TOKENS, max_sequences=8)

    def outputs(ahead: int) -> dict[str, RequestOutput]:
        engine = Engine(limits, 64, 1, (), _no_stops, ahead=ahead)
        for request in requests:
            engine.add(request)
        found = run_to_the_end(engine, tiny.runner.begin)
        assert engine.scheduler.blocks.num_free == 64
        return found

    before = {key: output.completions[0].token_ids for key, output in outputs(0).items()}
    token = before["3"][5]
    embedding = tiny.runner._stage.decoder.embedding
    assert embedding is not None
    embedding.weight[token] = torch.nan
    for ahead in (0, 1):
        found = outputs(ahead)
        for key, ids in before.items():
            if token in ids[:-1]:
                assert found[key].failure and not found[key].completions
            else:
                assert found[key].completions[0].token_ids == ids
        assert found["3"].failure


def _no_stops(stops: tuple[str, ...], preceding: object) -> Scanner:
    raise AssertionError(stops)
