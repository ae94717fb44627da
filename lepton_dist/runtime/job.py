"""The job behind the Python API: ranks other than 0 become workers when it starts, and never return to the script."""

from __future__ import annotations

import atexit
import ctypes
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import NoReturn

from lepton_dist.comm.launcher import read_launcher
from lepton_dist.comm.shared_memory import shortage
from lepton_dist.comm.world import World, open_world
from lepton_dist.engine.request import Request
from lepton_dist.errors import EXIT_FAILED, EXIT_STOPPED, LaunchError, LeptonError, RequestError, UsageError
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.guardian import Guardian, start_guardian
from lepton_dist.runtime.heartbeat import heartbeat
from lepton_dist.runtime.interrupts import Deferred, Interrupted, deferred_interrupts
from lepton_dist.runtime.run import START_TIMEOUT_S, dismiss, serve
from lepton_dist.runtime.watchdog import Watchdog
from lepton_dist.telemetry.voice import notice, report
from lepton_dist.text.completion import RequestOutput


class Job:
    """Rank 0's hold on the job of a script. It ends, with every other rank, when the script ends or fails."""

    def __init__(self, controller: Controller, guardian: Guardian | None, watchdog: Watchdog) -> None:
        self.controller = controller
        self.owner: object = None
        self._guardian, self._watchdog = guardian, watchdog
        self._code = self._num_calls = 0
        self._lost = ""  # why the ranks can do nothing together any more
        self._before = sys.excepthook
        sys.excepthook = self._on_failure
        atexit.register(self._end)

    @contextmanager
    def call(self) -> Iterator[Call]:
        """One call of the script: within the block the ranks may work. However it ends, the next call finds them idle.

        Raises:
            LeptonError: an earlier call has left the ranks in different places.
        """
        if self._lost:
            raise LeptonError(f"the ranks of this job cannot go on: {self._lost}. Start the script again")
        self._num_calls += 1
        self._watchdog.feed(timeout_s=START_TIMEOUT_S, phase="serving a call")
        try:
            with deferred_interrupts() as deferred:
                try:
                    yield Call(self.controller, f"{self._num_calls}/", deferred)
                except BaseException as error:
                    self._recover(error)
                    raise
        finally:
            self._watchdog.pause()

    def _recover(self, error: BaseException) -> None:
        """Make the ranks ready for another call, or see that they cannot be."""
        if isinstance(error, UsageError | RequestError | Interrupted):
            try:
                self.controller.abandon()
                return
            except LeptonError as second:
                error = second
        self.owner = None
        if self.controller.world.size == 1:
            # Whatever this rank was in the middle of, nobody waits for it.
            self.controller = Controller(open_world(launcher=read_launcher()), self._watchdog)
            return
        self._lost = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

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
        self._watchdog.feed(timeout_s=START_TIMEOUT_S, phase="leaving")
        if self._lost:
            # From where they are they cannot part in good order.
            world.abort(self._code or EXIT_FAILED)
        dismiss(world, self.controller, self._code)
        world.close(self._code)
        self._watchdog.disarm()
        if self._guardian is not None:
            heartbeat().attach(None)
            self._guardian.close()


@dataclass(frozen=True)
class Call:
    """A call of the script under way. `prefix` begins the keys of its requests: no other call's begin so."""

    controller: Controller
    prefix: str
    interrupts: Deferred

    def run(self, requests: Sequence[Request]) -> dict[str, RequestOutput]:
        """Run requests to their end; the outputs by key.

        Raises:
            Interrupted: the user has asked for it.
            RankLostError: a rank did not answer in time.
        """
        outputs: dict[str, RequestOutput] = {}
        for request in requests:
            self.interrupts.answer()
            self.controller.submit(request)
        while self.controller.num_outstanding:
            self.interrupts.answer()
            outputs.update(self.controller.advance())
        return outputs


@cache
def script_job() -> Job:
    """The job of this process, started by the first call; on ranks other than 0 that call does not return.

    Raises:
        LaunchError: the launcher and the MPI library do not belong together.
    """
    launcher = read_launcher()
    guardian = None
    if launcher.kind != "none":
        if problem := shortage(launcher):
            notice(problem)
        guardian = start_guardian(launcher.rank, world_size=launcher.size, host=socket.gethostname())
        heartbeat().attach(guardian)
    try:
        world = open_world(launcher=launcher)
    except LaunchError as error:
        if launcher.rank != 0:
            _leave(error.exit_code)
        raise
    if world.rank != 0:
        _work(world)
    label = f"rank 0 on host {world.hosts[0]}"
    watchdog = Watchdog(label, START_TIMEOUT_S, phase="waiting for a call", beat=heartbeat().beat)
    watchdog.pause()
    return Job(Controller(world, watchdog), guardian, watchdog)


def _work(world: World) -> NoReturn:
    """Serve rank 0 until it ends, and then end."""
    code = EXIT_FAILED
    try:
        label = f"rank {world.rank} on host {world.hosts[world.rank]}"
        with Watchdog(label, START_TIMEOUT_S, beat=heartbeat().beat) as watchdog:
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
