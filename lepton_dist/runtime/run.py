"""The one program: every rank runs `run`; rank 0 gets the controller, the others work until they are told to leave."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable

from lepton_dist.comm.launcher import read_launcher
from lepton_dist.comm.wait import Backoff
from lepton_dist.comm.world import World, open_world
from lepton_dist.errors import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USAGE,
    LaunchError,
    LeptonError,
    RequestError,
    StoppedEarly,
    UsageError,
)
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.heartbeat import heartbeat
from lepton_dist.runtime.interrupts import Interrupts, ignore_interrupts
from lepton_dist.runtime.messages import Message
from lepton_dist.runtime.rank import Rank
from lepton_dist.runtime.watchdog import Watchdog
from lepton_dist.telemetry.voice import report

START_TIMEOUT_S = 600.0
Program = Callable[[Controller, Interrupts], int]


def run(program: Program) -> int:
    """Run `program` on rank 0 with every other rank at its service; returns the job's exit code, the same on each rank.

    Errors are printed once. A fault from which the ranks cannot part in good order ends the job through MPI's abort.
    """
    launcher = read_launcher()
    # Before MPI starts, which waits for all ranks without a deadline of its own.
    label = f"rank {launcher.rank} on host {socket.gethostname()}"
    with Watchdog(label, START_TIMEOUT_S, beat=heartbeat().beat) as watchdog:
        try:
            world = open_world(launcher=launcher)
        except LaunchError as error:
            if launcher.rank == 0:
                report(error)
            return error.exit_code
        code = _lead(world, program, watchdog) if world.rank == 0 else serve(world, watchdog)
        watchdog.feed(timeout_s=START_TIMEOUT_S, phase="leaving")
        # A launcher may take the first rank that leaves with an error code for a failure, and signal the others.
        ignore_interrupts()
        world.close(code)
    return code


def _lead(world: World, program: Program, watchdog: Watchdog) -> int:
    interrupts = Interrupts()
    interrupts.install(lambda: world.abort(EXIT_STOPPED))
    controller = Controller(world, watchdog)
    try:
        code = program(controller, interrupts)
    except (UsageError, RequestError, StoppedEarly) as error:
        report(error)
        code = EXIT_USAGE if isinstance(error, RequestError) else error.exit_code
    except LeptonError as error:
        report(error)
        world.abort(error.exit_code)
    except BaseException:  # a fault of ours: show it, and let no rank wait for this one
        traceback.print_exc()
        world.abort(EXIT_FAILED)
    return dismiss(world, controller, code)


def dismiss(world: World, controller: Controller, code: int) -> int:
    """Let the other ranks go."""
    try:
        if controller.is_open:
            controller.close()
        controller.shutdown(code)
    except LeptonError as error:
        report(error)
        world.abort(code or error.exit_code)
    return code


def serve(world: World, watchdog: Watchdog) -> int:
    """The worker loop: advance, doze when idle, leave when told to."""
    ignore_interrupts()
    try:
        rank = Rank(world, _refuse, watchdog)
        backoff = Backoff()
        while rank.exit_code is None:
            if rank.advance():
                backoff.busy()
            else:
                backoff.idle()
        rank.flush()
        return rank.exit_code
    except LeptonError as error:
        report(LeptonError(f"rank {world.rank} on {world.hosts[world.rank]}: {error}"))
        world.abort(error.exit_code)
    except BaseException:  # as in `_lead`
        traceback.print_exc()
        world.abort(EXIT_FAILED)


def _refuse(message: Message) -> None:
    raise LeptonError(f"got the message {type(message).__name__}, which is for rank 0")
