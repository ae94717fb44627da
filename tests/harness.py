"""Runs MPI jobs as children of a test: with a deadline, in a process group of their own, ended by their ids.

A crash or a hang of a job stays inside it, and the test that started it has one result and all of its output.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# What Open MPI needs to run as root, with more ranks than cores, on one machine without fast networks.
OPENMPI_SETTINGS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
# Variables by which a launcher speaks to its ranks; a job started from inside another must not inherit them.
_LAUNCHER_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MPI_LOCAL", "HYDI_", "PRTE_LAUNCHED")
# Ranks leave within this time of their launcher's end.
LEAVING_SECONDS = 3.0
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
    """How a job ended.

    `returncode` is None when it ran past its deadline and was killed. `left` holds the ids of processes that were
    still there `LEAVING_SECONDS` after the launcher had ended, and were killed then.
    """

    returncode: int | None
    left: tuple[int, ...]
    stdout: str
    stderr: str
    seconds: float

    def report(self) -> str:
        """Everything a failing test should show."""
        state = "ran past its deadline" if self.returncode is None else f"ended with {self.returncode}"
        return f"job {state} after {self.seconds:.1f} s\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"


class Job:
    """A running job. Its output goes to files, so that no full pipe can stop it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, cwd: Path) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._start = time.monotonic()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(environment),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        """What the job has written so far."""
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What the job has written to its standard error so far."""
        return self._err.read_text(errors="replace")

    def wait(self, seconds: float) -> Finished:
        """Wait for the end, and kill whatever is left after `seconds`."""
        code: int | None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        end = time.monotonic() + LEAVING_SECONDS
        while code is not None and self.pids() and time.monotonic() < end:
            time.sleep(0.02)
        left = tuple(self.pids())
        self.kill()
        return Finished(code, left, self.stdout, self.stderr, time.monotonic() - self._start)

    def kill(self) -> None:
        """SIGKILL for every process of the job that is still there; returns when they are gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended by itself in the meantime
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """The ids of the job's processes: the launcher, its helpers, and the ranks.

        Launchers put helpers and ranks into sessions of their own, so they are known by the mark in their environment.
        """
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    variables = (entry / "environ").read_bytes()
                except OSError:
                    continue  # gone, or another user's
                if self._mark in variables.split(b"\0"):
                    found.append(int(entry.name))
        return found

    @property
    def _mark(self) -> bytes:
        return f"LEPTON_TEST_JOB={self._out.parent}".encode()


def mpirun() -> Path:
    """The mpirun that belongs to the MPI of this Python, from beside its executable."""
    return Path(sys.executable).parent / "mpirun"


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without any launcher's variables, and with what both MPIs need here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    path = os.pathsep.join(part for part in (str(_ROOT), kept.get("PYTHONPATH", "")) if part)
    return {**kept, **OPENMPI_SETTINGS, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(extra or {})}


@contextmanager
def started(
    arguments: Sequence[str | Path],
    *,
    ranks: int | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[Job]:
    """A running ``python ARGUMENTS``, under ``mpirun -n RANKS`` unless `ranks` is None. Killed when the block ends."""
    launcher = [] if ranks is None else [str(mpirun()), "-n", str(ranks)]
    command = [*launcher, sys.executable, *map(str, arguments)]
    with tempfile.TemporaryDirectory(prefix="lepton-job-") as name:
        mark = {"LEPTON_TEST_JOB": name}
        job = Job(command, {**environment(env), **mark}, Path(name), cwd or _ROOT)
        try:
            yield job
        finally:
            job.kill()


def run(
    arguments: Sequence[str | Path],
    *,
    ranks: int | None = None,
    seconds: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Run ``python ARGUMENTS`` to its end, on `ranks` ranks under mpirun, or alone without a launcher."""
    with started(arguments, ranks=ranks, env=env, cwd=cwd) as job:
        return job.wait(seconds)
