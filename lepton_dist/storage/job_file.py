"""``OUTPUT.job.json``: which run an output belongs to, and whether it is complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from lepton_dist.errors import OutputError
from lepton_dist.storage.durable import replace_file
from lepton_dist.storage.input_rows import InputRows, compare, hash_keys, read_input_rows
from lepton_dist.storage.output_files import rows_path

RUNNING, COMPLETE = "running", "complete"


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
    """Replace the file in one step; syncing its directory is left to the caller.

    Raises:
        OSError: the old one is as it was.
    """
    replace_file(path, [msgspec.json.format(msgspec.json.encode(job), indent=2) + b"\n"], syncs_directory=False)


def check_same_run(
    path: Path,
    job: Job,
    wanted: Mapping[str, str],
    rows: InputRows | None,
    done: Iterable[tuple[bytes, tuple[str, bool] | None]],
) -> int:
    """Refuse to mix the rows of two runs in one output; how many rows of the output the input no longer has.

    Args:
        path: the output; `job` is what lies beside it.
        wanted: the identity of the run that would go on with it.
        rows: the rows of its input. An input that has changed is the same run's if every row that is done is in both
            inputs, unchanged.
        done: the output's rows, each with its key and whether it is an error row; read only where the inputs differ.

    Raises:
        OutputError: names every field that differs, with both values, or says how many rows have changed.
    """
    before = _rows_before(path, job, rows)
    if before is None or rows is None:
        _check_identity(path, job.identity, wanted)
        return 0
    _check_identity(path, {**job.identity, "input": rows.digest}, wanted)
    kept = [row for _, row in done if row is not None]
    changed, gone = compare(before, rows, hash_keys(key for key, _ in kept))
    if changed:
        retry = "; error rows are run again with --retry-errors" if any(is_error for _, is_error in kept) else ""
        raise OutputError(
            f"{path}: holds the answers of {changed} row(s) of the input that have changed since. Rows without an "
            f"answer may change, be added or go{retry}. Undo the change, choose another output, or start anew with "
            "--overwrite"
        )
    return gone


def _rows_before(path: Path, job: Job, rows: InputRows | None) -> InputRows | None:
    """The rows of the input that the output was made from, where it was another input and they are known."""
    if rows is None or job.identity.get("input") == rows.digest:
        return None
    before = read_input_rows(rows_path(path))
    # They may be this input's already: a start that was killed before it wrote the job file had compared them.
    is_known = before is not None and before.digest in (job.identity.get("input"), rows.digest)
    return before if is_known else None


def _check_identity(path: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if names:
        differing = "; ".join(
            f"{name} was {found.get(name, 'not given')}, now {wanted.get(name, 'not given')}" for name in names
        )
        raise OutputError(
            f"{path}: the output belongs to another run: {differing}. Give the command of that run to resume it, "
            "choose another output, or start anew with --overwrite"
        )
