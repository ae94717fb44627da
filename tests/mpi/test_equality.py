"""Every family under every plan gives transformers' text: greedy, and sampled with the same seed, in float32.

One mpirun a rank count runs all of its models and plans; a single rank runs in this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from lepton_dist.comm.world import open_world
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.runtime.controller import Controller
from tests.harness import run
from tests.mpi.equality.cases import (
    BATCH_SIZES,
    GREEDY_TOKENS,
    PLANS,
    PROMPT_LENGTHS,
    SAMPLED_TOKENS,
    SAMPLINGS,
    Case,
    Opening,
    Outcome,
    prompt,
    with_engine,
)
from tests.mpi.equality.job import check
from tests.mpi.equality.models import MODELS, Model, make_model
from tests.mpi.equality.reference import NEAR_TIE, Reference


def greedy_cases(name: str, reference: Reference) -> list[Case]:
    cases = []
    for length in PROMPT_LENGTHS:
        ids = prompt(name, length)
        expected = reference.greedy(ids, GREEDY_TOKENS)
        sampling = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS)
        cases.append(Case(f"greedy-{length}", ids, sampling, expected.ids, expected.gaps))
    return cases


def sampled_cases(name: str, reference: Reference) -> list[Case]:
    cases = []
    for index, fields in enumerate(SAMPLINGS):
        sampling = SamplingParams(**{"seed": index * 7919 - 3, "max_tokens": SAMPLED_TOKENS, **fields})  # type: ignore[arg-type]
        ids = prompt(name, 5 + 4 * index)
        expected = reference.sampled(ids, sampling)
        cases.append(Case(f"sampled-{index}", ids, sampling, expected.ids, expected.gaps))
    return cases


class Prepared(msgspec.Struct):
    """A model on disk, and its cases."""

    model: Model
    directory: Path
    cases: list[Case]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> list[Prepared]:
    folder = tmp_path_factory.mktemp("models")
    made = []
    for model in MODELS:
        directory = make_model(model, folder)
        reference = Reference(directory)
        made.append(
            Prepared(model, directory, [*greedy_cases(model.name, reference), *sampled_cases(model.name, reference)])
        )
    return made


def openings(prepared: list[Prepared], plans: Mapping[str, str], turn: int | None = None) -> list[Opening]:
    """Every model under every plan, or every second pair; the first model at every batch size, the others in turn."""
    found = []
    for index, made in enumerate(prepared):
        for number, (name, plan) in enumerate(plans.items()):
            if turn is not None and (index + number + turn) % 2:
                continue
            sizes = BATCH_SIZES if index == 0 else (BATCH_SIZES[1:][index % 2],)
            for size in sizes:
                text = with_engine(plan, max_sequences=size, max_batch_tokens=16 if index % 2 else 32)
                label = f"{made.model.name} {name} max_sequences {size}"
                found.append(Opening(label, str(made.directory), text, "float32", made.cases))
    return found


def judge(outcome: Outcome, expected: list[Opening]) -> None:
    """No real difference, and the near ties counted (shown by ``pytest -s``, and when a test fails)."""
    for difference in outcome.differences:
        print(difference)
    print(f"{outcome.num_tokens} tokens equal, {outcome.num_near_ties} near ties (below {NEAR_TIE:g})")
    assert not outcome.differences
    total = sum(len(case.ids) for opening in expected for case in opening.cases)
    # Random weights of this size have a near tie about once in 10,000 tokens: more would hide a fault.
    assert outcome.num_tokens > 0.99 * total and outcome.num_near_ties <= max(2, total // 1000)


def test_the_references_texts_are_worth_comparing(prepared: list[Prepared]) -> None:
    """Degenerate text (one token for ever) would equal itself under many faults."""
    for made in prepared:
        seen = {token for case in made.cases for token in case.ids}
        assert len(seen) > 30, f"{made.model.name}: only {len(seen)} different tokens"
    assert sum(len(list(made.directory.glob("*.safetensors"))) > 1 for made in prepared) >= 2


def test_one_rank(prepared: list[Prepared]) -> None:
    todo = openings(prepared, PLANS[1])
    judge(check(Controller(open_world()), todo), todo)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks(prepared: list[Prepared], ranks: int, every: bool, tmp_path: Path) -> None:
    todo = openings(prepared, PLANS[ranks], None if every else ranks)
    source, target = tmp_path / "openings.json", tmp_path / "outcome.json"
    source.write_bytes(msgspec.json.encode(todo))
    job = run(["-m", "tests.mpi.equality.job", source, target], ranks=ranks, seconds=240)
    assert job.returncode == 0, job.report()
    judge(msgspec.json.decode(target.read_bytes(), type=Outcome), todo)
