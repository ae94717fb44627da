"""In bfloat16 we are as close to float32 as transformers is: the root mean square error of log-probabilities.

Both run the same weights, rounded to bfloat16, teacher-forced over the same random prompts of every family; float32 on
the rounded weights is the truth. One mpirun of two ranks runs one rank alone, tp 2 and pp 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch

from tests.harness import run
from tests.mpi.equality.cases import prompt, with_engine
from tests.mpi.equality.models import MODELS, make_model
from tests.mpi.equality.reference import load_reference
from tests.mpi.equality.score_job import Scored, Scoring

PLANS: Mapping[str, str] = {
    "one": "replicas: [{stages: [{ranks: [0]}]}]",
    "tp2": "mesh: {tp: 2}",
    "pp2": "mesh: {pp: 2}",
}
NUM_PROMPTS, PROMPT_LENGTH = 10, 206  # 2,050 scored positions
MOST_TIMES_TRANSFORMERS = 1.15  # the project's own limit


def teacher_forced(directory: Path, dtype: torch.dtype, prompts: list[list[int]]) -> torch.Tensor:
    """transformers' log-probability of each token after the first, float64 [prompts, length - 1]."""
    model = load_reference(directory, dtype)
    rows = []
    with torch.inference_mode():
        for ids in prompts:
            logprobs = model(torch.tensor([ids])).logits[0, :-1].float().double().log_softmax(dim=1)
            rows.append(logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1))
    return torch.stack(rows)


def rms(error: torch.Tensor) -> float:
    return math.sqrt(float(error.square().mean()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bfloat16")


@pytest.fixture(scope="module")
def scored(folder: Path) -> dict[str, list[list[float]]]:
    """Our log-probabilities by "model plan"."""
    todo = []
    for model in MODELS:
        directory = make_model(model, folder, torch.bfloat16)
        prompts = [prompt(f"{model.name} {index}", PROMPT_LENGTH) for index in range(NUM_PROMPTS)]
        for name, plan in PLANS.items():
            text = with_engine(plan, max_batch_tokens=100, block_tokens=16)
            todo.append(Scoring(f"{model.name} {name}", str(directory), text, "bfloat16", prompts))
    source, target = folder / "openings.json", folder / "scored.json"
    source.write_bytes(msgspec.json.encode(todo))
    job = run(["-m", "tests.mpi.equality.score_job", source, target], ranks=2, seconds=200)
    assert job.returncode == 0, job.report()
    return {one.name: one.logprobs for one in msgspec.json.decode(target.read_bytes(), type=list[Scored])}


@pytest.mark.parametrize("name", [model.name for model in MODELS])
def test_error_is_at_most_transformers(name: str, scored: dict[str, list[list[float]]], folder: Path) -> None:
    directory = folder / name
    prompts = [prompt(f"{name} {index}", PROMPT_LENGTH) for index in range(NUM_PROMPTS)]
    truth = teacher_forced(directory, torch.float32, prompts)
    theirs = rms(teacher_forced(directory, torch.bfloat16, prompts) - truth)
    ours = {plan: rms(torch.tensor(scored[f"{name} {plan}"], dtype=torch.float64) - truth) for plan in PLANS}
    print(f"{name}: transformers {theirs:.4f}", {plan: f"{error:.4f}" for plan, error in ours.items()})
    assert truth.numel() >= 2000
    assert max(ours.values()) <= MOST_TIMES_TRANSFORMERS * theirs
