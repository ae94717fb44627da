"""Scores prompts, teacher-forced: ``python -m tests.mpi.equality.score_job SCORINGS.json SCORED.json`` under mpirun."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request
from lepton_dist.plan.document import parse_plan
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.run import run
from tests.mpi.equality.job import finish


class Scoring(msgspec.Struct):
    """One session: a model under a plan, and the prompts to score."""

    name: str
    model: str
    plan: str
    dtype: str
    prompts: list[list[int]]


class Scored(msgspec.Struct):
    """The log-probability of every token of every prompt but the first."""

    name: str
    logprobs: list[list[float]]


def score(controller: Controller, scoring: Scoring) -> Scored:
    """Open the session, score, close it."""
    open_model(controller, ModelRequest(scoring.model, parse_plan(scoring.plan), scoring.dtype, threads=1))
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    requests = [Request(str(index), ids, sampling) for index, ids in enumerate(scoring.prompts)]
    outputs = finish(controller, requests)
    controller.close()
    rows = [outputs[str(index)].prompt_logprobs or [] for index in range(len(requests))]
    return Scored(scoring.name, [[entries[0].logprob for entries in row[1:] if entries] for row in rows])


def main(arguments: Sequence[str]) -> int:
    """Score the prompts of a file on every rank of the job."""
    source, target = map(Path, arguments)

    def program(controller: Controller, interrupts: Interrupts) -> int:
        todo = msgspec.json.decode(source.read_bytes(), type=list[Scoring])
        target.write_bytes(msgspec.json.encode([score(controller, scoring) for scoring in todo]))
        return 0

    return run(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
