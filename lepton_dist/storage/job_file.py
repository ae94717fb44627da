"""``OUTPUT.job.json``: which run an output belongs to, and whether it is complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from lepton_dist.errors import OutputError
from lepton_dist.storage.durable import replace_file

RUNNING, COMPLETE = "running", "complete"
_PRIVATE = 0o600


class Job(msgspec.Struct, kw_only=True):
    """The content of the file.

    Attributes:
        state: `RUNNING` or `COMPLETE`.
        identity: what the rows depend on, as short texts by name: two runs with equal identities give equal rows.
        rows: how many rows the output had when it was completed.
    """

    state: str
    identity: dict[str, str]
    rows: int = 0


def read_job(path: Path) -> Job | None:
    """The job, or None where the file is absent.

    Raises:
        OutputError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        job = msgspec.json.decode(path.read_bytes(), type=Job)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise OutputError(f"{path}: is not a job file ({error}); start anew with --overwrite") from None
    if job.state not in (RUNNING, COMPLETE):
        raise OutputError(f"{path}: has the unknown state {job.state!r}; start anew with --overwrite")
    return job


def write_job(path: Path, job: Job) -> None:
    """Replace the file in one step; only its owner can read it.

    Raises:
        OSError: the old one is as it was.
    """
    replace_file(path, [msgspec.json.format(msgspec.json.encode(job), indent=2) + b"\n"], mode=_PRIVATE)


def check_identity(path: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Refuse to mix the rows of two runs in one output.

    Raises:
        OutputError: names every field that differs, with both values.
    """
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if names:
        differing = "; ".join(
            f"{name} was {found.get(name, 'not given')}, now {wanted.get(name, 'not given')}" for name in names
        )
        raise OutputError(
            f"{path}: the output belongs to another run: {differing}. Give the command of that run to resume it, "
            "choose another output, or start anew with --overwrite"
        )
