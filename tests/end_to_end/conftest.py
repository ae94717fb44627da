"""The undisturbed run that every disturbed one is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.rig import MODEL, NUM_BAD, SETTINGS, Row, by_key, generate, read_rows, workload
from tests.harness import run


@dataclass(frozen=True)
class Undisturbed:
    """An input, and the rows that a run without any trouble answers it with."""

    source: Path
    rows: dict[str, Row]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    source = workload(folder / "in.jsonl")
    job = run(generate(MODEL, source, folder / "out.jsonl", *SETTINGS), seconds=120)
    assert job.returncode == 3, job.report()
    rows = by_key(read_rows(folder / "out.jsonl"))
    assert len(rows) == len(source.read_bytes().splitlines())
    assert sum("error" in row for row in rows.values()) == NUM_BAD
    return Undisturbed(source, rows)
