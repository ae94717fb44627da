"""A whole job inside one process: rank 0 drives, the other ranks are threads. It shows the engine's counters too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lepton_dist.comm.wait import Backoff
from lepton_dist.comm.world import World, run_local
from lepton_dist.engine.request import Request
from lepton_dist.errors import LeptonError
from lepton_dist.plan.document import parse_plan
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.messages import Message
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.rank import Rank
from lepton_dist.text.completion import RequestOutput
from tests.mpi.equality.job import finish


@dataclass(frozen=True)
class Ran:
    """What a job gave, and how its engine (of the replica that rank 0 leads) came there."""

    outputs: dict[str, RequestOutput]
    num_preemptions: int
    num_reused_tokens: int
    num_free_blocks: int
    num_blocks: int
    num_unsent: int

    def ids(self, key: str, sample: int = 0) -> list[int]:
        """The generated ids of a request's sample."""
        return self.outputs[key].completions[sample].token_ids


def run_job(directory: Path, plan: str, requests: Sequence[Request], *, ranks: int = 1, dtype: str = "float32") -> Ran:
    """Run the requests to their end in one session on `ranks` ranks."""

    def lead(world: World) -> Ran:
        controller = Controller(world)
        try:
            open_model(controller, ModelRequest(str(directory), parse_plan(plan), dtype, threads=1))
            outputs = finish(controller, requests)
            # The counters have no public way up: a job's messages do not carry them.
            leader = controller._rank._leader
            assert leader is not None
            scheduler = leader._engine.scheduler
            blocks = scheduler.blocks
            counters = scheduler.num_preemptions, scheduler.num_reused_tokens, blocks.num_free, blocks.num_blocks
            session = controller._rank._session
            assert session is not None
            link = session.runner._stage.link
        finally:
            if controller.is_open:
                controller.close()
            controller.shutdown(0)
        return Ran(outputs, *counters, len(link._sending))

    def serve(world: World) -> None:
        rank = Rank(world, _refuse)
        backoff = Backoff()
        while rank.exit_code is None:
            if rank.advance():
                backoff.busy()
            else:
                backoff.idle()

    ran = run_local(ranks, lambda world: lead(world) if world.rank == 0 else serve(world))[0]
    assert ran is not None
    return ran


def _refuse(message: Message) -> None:
    raise LeptonError(f"{type(message).__name__} is for rank 0")
