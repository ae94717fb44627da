"""Where an output lies, and the files that a journal keeps beside it."""

from __future__ import annotations

from pathlib import Path

from lepton_dist.errors import OutputError
from lepton_dist.storage.durable import draft_of


def job_path(output: Path) -> Path:
    """What run an output belongs to."""
    return output.with_name(output.name + ".job.json")


def rows_path(output: Path) -> Path:
    """What the rows of its input were."""
    return output.with_name(output.name + ".job.rows")


def lock_path(output: Path) -> Path:
    """Who writes it."""
    return output.with_name(output.name + ".lock")


def files_of_output(output: str | Path) -> list[Path]:
    """The output and every file that a journal writes beside it, links followed; none need exist."""
    path = Path(output).resolve()
    kept = [path, job_path(path), rows_path(path)]
    return [*kept, *(draft_of(each) for each in kept), lock_path(path)]


def usable_path(output: Path) -> Path:
    """Where an output really lies, links followed, if a file can be there.

    Raises:
        OutputError: it cannot.
    """
    try:
        path = output.resolve()
    except RuntimeError:
        raise OutputError(f"{output}: the output is a link that leads back to itself") from None
    if path.exists() and not path.is_file():
        what = "a directory" if path.is_dir() else "not a regular file"
        raise OutputError(f"{output}: the output is {what}; name a file to write")
    if not path.parent.is_dir():
        raise OutputError(f"{output}: the output's directory {path.parent} does not exist; create it first")
    return path
