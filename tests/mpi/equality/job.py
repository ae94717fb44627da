"""The program of an equality job: ``python -m tests.mpi.equality.job OPENINGS.json OUTCOME.json`` under mpirun.

Rank 0 opens one session after another and compares; the others serve, as in every job.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lepton_dist.engine.request import Request
from lepton_dist.plan.document import parse_plan
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.interrupts import Interrupts
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.run import run
from lepton_dist.text.completion import RequestOutput
from tests.mpi.equality.cases import Case, Difference, Opening, Outcome
from tests.mpi.equality.reference import NEAR_TIE


def finish(controller: Controller, requests: Sequence[Request]) -> dict[str, RequestOutput]:
    """Run requests to their end in the open session."""
    for request in requests:
        controller.check(request)
        controller.submit(request)
    outputs: dict[str, RequestOutput] = {}
    while len(outputs) < len(requests):
        outputs.update(controller.advance())
    return outputs


def compare(controller: Controller, opening: Opening, outcome: Outcome) -> None:
    """Run an opening's cases and note what differs.

    A greedy text that leaves the reference at a near tie goes on behind the reference's token; a sampled one ends.
    """
    open_model(controller, ModelRequest(opening.model, parse_plan(opening.plan), opening.dtype, threads=1))
    left: dict[str, tuple[Case, int]] = {case.name: (case, 0) for case in opening.cases}
    while left:
        outputs = finish(controller, [_request(case, done) for case, done in left.values()])
        again: dict[str, tuple[Case, int]] = {}
        for name, (case, done) in left.items():
            step = _first_difference(case, done, outputs[name].completions[0].token_ids)
            outcome.num_tokens += (len(case.ids) if step is None else step) - done
            if step is None:
                continue
            if case.gaps[step] >= NEAR_TIE:
                found = outputs[name].completions[0].token_ids
                outcome.differences.append(Difference(opening.name, name, step, case.ids[done:], found))
                continue
            outcome.num_near_ties += 1
            if case.sampling.temperature == 0 and step + 1 < len(case.ids):
                again[name] = (case, step + 1)
        left = again
    controller.close()


def _request(case: Case, done: int) -> Request:
    room = len(case.ids) - done
    sampling = msgspec.structs.replace(case.sampling, max_tokens=room, ignore_eos=True)
    return Request(case.name, case.prompt + case.ids[:done], sampling)


def _first_difference(case: Case, done: int, found: Sequence[int]) -> int | None:
    expected = case.ids[done:]
    if list(found) == expected:
        return None
    pairs = enumerate(zip(expected, found, strict=False))
    return done + next((index for index, (a, b) in pairs if a != b), min(len(expected), len(found)))


def check(controller: Controller, openings: Sequence[Opening]) -> Outcome:
    """Compare every opening."""
    outcome = Outcome(differences=[])
    for opening in openings:
        compare(controller, opening, outcome)
    return outcome


def main(arguments: Sequence[str]) -> int:
    """Run the openings of a file on every rank of the job."""
    source, target = map(Path, arguments)

    def program(controller: Controller, interrupts: Interrupts) -> int:
        openings = msgspec.json.decode(source.read_bytes(), type=list[Opening])
        target.write_bytes(msgspec.json.encode(check(controller, openings)))
        return 0

    return run(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
