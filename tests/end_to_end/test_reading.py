"""How often ranks open a checkpoint's files, and how many of its bytes they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.rig import MODEL, arguments, plan, write_rows
from tests.harness import run

JOB = Path(__file__).with_name("opens_job.py")


@pytest.mark.parametrize("mesh", ["tp: 2", pytest.param("dp: 2", marks=pytest.mark.slow)])
def test_headers_are_read_once(mesh: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "import os", "max_tokens": 2}])
    plan_path = plan(tmp_path / "plan.yaml", mesh)
    options = arguments(MODEL, source, tmp_path / "out.jsonl", "--plan", plan_path)
    job = run([JOB, MODEL, tmp_path, "generate", *options], ranks=2)
    assert job.returncode == 0, job.report()
    told, other = (json.loads((tmp_path / f"opened-{rank}.json").read_text()) for rank in range(2))
    # Before it meets the others a rank reads the small files and the header, and never again.
    assert other == {"config.json": 1, "generation_config.json": 1, "model.safetensors": 1}
    assert told["model.safetensors"] == 1
