"""The file of a run's decisions: whose lines it holds, and what a run that goes on without it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_dist.runtime.decision_log import decision_log


def test_lines_until_the_end_and_none_after(tmp_path: Path) -> None:
    with decision_log(str(tmp_path / "log.jsonl")) as write:
        assert write is not None
        write("first\n")
    # A replica's last word, while the session closes: it ended a run of which all rows were written with a traceback.
    write("late\n")
    assert (tmp_path / "log.jsonl").read_text() == "first\n"


def test_a_disk_that_fails_ends_the_log_once(capsys: pytest.CaptureFixture[str]) -> None:
    with decision_log("/dev/full") as write:
        assert write is not None
        for _ in range(3):
            write("x" * 10_000 + "\n")  # more than a stream keeps back
    assert capsys.readouterr().err.count("warning: the decision log ends here: /dev/full: No space left on device") == 1


def test_no_log_without_a_path() -> None:
    with decision_log(None) as write:
        assert write is None
