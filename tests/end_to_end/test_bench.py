"""`lepton-dist bench` as a user starts it: on one rank and on two, compared, as a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import Finished, run


def bench(folder: Path, *more: object, ranks: int | None = None) -> Finished:
    words = ["-m", "lepton_dist.cli.main", "bench", "--shape", "tiny", "--folder", folder, "--repeats", "1"]
    return run([*words, "--output-tokens", "4", "--threads", "1", *more], ranks=ranks, seconds=100)


def test_two_ranks_under_several_settings(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    cases = ("prefill", "decode b1", "offline")
    settings = ("plain", "int8", "tp2", "pp2+wire-int8")
    job = bench(tmp_path, "--compare", ",".join(settings), "--cases", ",".join(cases), "--json", figures, ranks=2)
    assert job.returncode == 0, job.report()
    for text in ("limits of 2 rank(s)", "memory read", "all-reduce of 2 ranks", "medians (times the first)"):
        assert text in job.stdout, job.report()
    found = json.loads(figures.read_text())["settings"]
    assert tuple(found) == settings
    for rows in found.values():
        assert [row["case"] for row in rows] == ["load", *cases]
        for row in rows[1:]:
            assert 0 < row["lowest"] <= row["value"] <= row["highest"] and row["unit"] == "tokens/s"
            assert row["share"] == row["value"] / row["limit"] > 0


def test_what_is_wrong_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    job = bench(tmp_path, "--compare", "plain,tp2", "--cases", "prefill")
    assert job.returncode == 2 and "tp2" in job.stderr, job.report()
    assert "prefill" not in job.stdout, job.report()
    (tmp_path / "file").touch()
    unwritable = tmp_path / "file" / "figures.json"
    job = bench(tmp_path, "--cases", "prefill", "--json", unwritable)
    assert job.returncode == 2 and str(unwritable) in job.stderr, job.report()
    assert job.stdout == "", job.report()
    assert "Traceback" not in job.stderr, job.report()


@pytest.mark.slow  # half a minute, of which the machine's own rates take most
def test_what_was_measured_stands_there_when_the_next_setting_fails(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("mesh: {tp: 1}\nengine: {kv_cache_bytes: 1}\n")
    job = bench(tmp_path, "--plan", plan, "--compare", "plain,plan", "--cases", "prefill")
    assert job.returncode == 2 and "kv_cache_bytes" in job.stderr, job.report()
    assert "prefill" in job.stdout, job.report()
    assert "Traceback" not in job.stderr, job.report()
