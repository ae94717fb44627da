"""The job behind the Python API: ranks other than 0 become workers when it starts, and never return to the script."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
from functools import cache
from types import TracebackType
from typing import NoReturn

from lepton_dist.comm.launcher import read_launcher
from lepton_dist.comm.world import World, open_world
from lepton_dist.errors import EXIT_FAILED, EXIT_STOPPED, LaunchError, LeptonError
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.guardian import Guardian, start_guardian
from lepton_dist.runtime.run import START_TIMEOUT_S, dismiss, serve
from lepton_dist.runtime.watchdog import Watchdog
from lepton_dist.telemetry.voice import report


class Job:
    """Rank 0's hold on the job of a script. It ends, with every other rank, when the script ends or fails."""

    def __init__(self, controller: Controller, guardian: Guardian | None) -> None:
        self.controller = controller
        self.owner: object = None
        self._guardian = guardian
        self._code = 0
        self._before = sys.excepthook
        sys.excepthook = self._on_failure
        atexit.register(self._end)

    def _on_failure(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._code = 1
        self._before(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            self.controller.world.abort(EXIT_STOPPED)
        if isinstance(error, LeptonError) and error.exit_code == EXIT_FAILED:
            # From a step cut short, or without one of them, the ranks cannot part in good order.
            self.controller.world.abort(EXIT_FAILED)

    def _end(self) -> None:
        world = self.controller.world
        dismiss(world, self.controller, self._code)
        world.close(self._code)
        if self._guardian is not None:
            self._guardian.close()


@cache
def script_job() -> Job:
    """The job of this process, started by the first call; on ranks other than 0 that call does not return.

    Raises:
        LaunchError: the launcher and the MPI library do not belong together.
    """
    launcher = read_launcher()
    guardian = None
    if launcher.kind != "none":
        guardian = start_guardian(launcher.rank, world_size=launcher.size, host=socket.gethostname())
    try:
        world = open_world(launcher=launcher)
    except LaunchError as error:
        if launcher.rank != 0:
            _leave(error.exit_code)
        raise
    return Job(Controller(world), guardian) if world.rank == 0 else _work(world)


def _work(world: World) -> NoReturn:
    """Serve rank 0 until it ends, and then end."""
    code = EXIT_FAILED
    try:
        with Watchdog(f"rank {world.rank} on host {world.hosts[world.rank]}", START_TIMEOUT_S) as watchdog:
            code = serve(world, watchdog)
            world.close(code)
    except BaseException as error:  # nothing may bring a worker back into the script
        report(error)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process without running the rest of the script, nor its exit handlers.

    Through C's exit, not `os._exit`: MPICH takes its leave of the launcher in an exit handler of its own, and a process
    that skips it makes the launcher kill the others.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(code)
    os._exit(code)
