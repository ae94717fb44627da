"""The report that a run leaves beside its output."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.rig import MODEL, generate, plan, read_rows, write_rows
from tests.harness import run


def test_a_run_leaves_a_report_of_every_step(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"def f{i}(x):"} for i in range(12)])
    output = tmp_path / "out.jsonl"
    words = generate(MODEL, source, output, "--max-tokens", "8", "--plan", plan(tmp_path / "plan.yaml", "dp: 2"))
    job = run(words, ranks=2, seconds=60)
    assert job.returncode == 0, job.report()
    rows = read_rows(output)
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["tokens"] == sum(row["usage"]["completion_tokens"] for row in rows)
    assert sum(replica["requests"] for replica in report["replicas"]) == len(rows) == 12
    assert all(0 <= rank["busy"] <= 1 for rank in report["ranks"]) and len(report["ranks"]) == 2
    page = tmp_path / "out.jsonl.report.html"
    assert "<svg" in page.read_text()
    # Prompts and texts are nobody's business but the output's.
    assert not any("def f" in path.read_text() for path in tmp_path.glob("*.report.*"))
