"""`doctor` on what rank 0 alone can tell: the MPI that a job would get, and the place for the output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lepton_dist.bench.doctor_check import Check, size
from lepton_dist.bench.doctor_machine import library_name
from lepton_dist.comm.launcher import MATCHING_LAUNCHERS, library_kind
from lepton_dist.errors import LeptonError
from lepton_dist.storage.journal_lock import OutputLock

LITTLE_DISK_BYTES = 1 << 30
_PROGRAM_TIMEOUT_S = 20.0
_ALONE = "a single rank works without it"


def check_mpi_alone() -> Check:
    """The MPI library and the mpirun that a job of several ranks would get, for a process that was started alone."""
    code, library = _output([sys.executable, "-m", "mpi4py", "--mpi-lib-version"])
    if code:
        return Check(
            "MPI",
            "WARN",
            f"no MPI library can be loaded: {_last_line(library)}; {_ALONE}",
            "pip install 'lepton-dist[mpich]', or name the site's own with MPI4PY_LIBMPI=/path/to/libmpi.so",
        )
    version = library_name(library)
    kind = library_kind(library)
    mpirun = _mpirun()
    if mpirun is None:
        advice = f"start jobs with srun, or put on PATH {MATCHING_LAUNCHERS[kind]}"
        return Check("MPI", "WARN", f"{version}; no mpirun beside this Python or on PATH; {_ALONE}", advice)
    found = f"{version}; {mpirun}"
    launcher = _launcher_kind(_output([mpirun, "--version"])[1])
    if "unknown" not in (kind, launcher) and kind != launcher:
        advice = f"start jobs with {MATCHING_LAUNCHERS[kind]}"
        return Check("MPI", "WARN", f"{found} belongs to another MPI ({launcher}); {_ALONE}", advice)
    return Check("MPI", "OK", f"{found}; this is one rank without a launcher: links are measured under mpirun or srun")


def check_output(directory: str) -> Check:
    """Whether results can be written here, safely, by one writer at a time."""
    path = Path(directory)
    if not path.is_dir():
        return Check("output", "FAIL", f"{path} is no directory", "create it, or name another with --output")
    probe = path / f".lepton-doctor-{os.getpid()}"
    try:
        lock = OutputLock.acquire(probe, wait_s=0.0)
        try:
            _write_durably(probe)
        finally:
            probe.unlink(missing_ok=True)
            lock.release()
        free_bytes = shutil.disk_usage(path).free
    except (OSError, LeptonError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return Check("output", "FAIL", f"{path} cannot be written: {reason}", "name another directory with --output")
    found = f"{path}: files can be written and synced; {size(free_bytes)} free"
    if not lock.is_exclusive:
        advice = "see to it yourself that no two jobs write the same file, or choose a file system with flock"
        return Check("output", "WARN", f"{found}; this file system has no locks (flock)", advice)
    if free_bytes < LITTLE_DISK_BYTES:
        return Check("output", "WARN", f"{found}; locks work", "make room: a full disk stops the run (exit code 75)")
    return Check("output", "OK", f"{found}; locks work")


def _write_durably(path: Path) -> None:
    with path.open("xb") as file:
        file.write(b"lepton-dist doctor\n")
        file.flush()
        os.fsync(file.fileno())


def _mpirun() -> str | None:
    """The mpirun of this environment, else PATH's."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")


def _launcher_kind(version: str) -> str:
    """The key of `MATCHING_LAUNCHERS` for what ``mpirun --version`` says."""
    for mark, kind in (("Intel", "intel"), ("Open MPI", "openmpi"), ("OpenRTE", "openmpi"), ("HYDRA", "mpich")):
        if mark in version:
            return kind
    return "unknown"


def _output(command: list[str]) -> tuple[int, str]:
    """Exit code and all output of a short program; a code of -1 where it cannot be run."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROGRAM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, (done.stdout + done.stderr).replace("\0", "").strip()


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no output"
