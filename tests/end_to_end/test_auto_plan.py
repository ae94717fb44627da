"""`mesh: auto`: the planner inside the job; and the balancer's log of a run, which gives the same decisions again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_dist.coordinator.cluster import Cluster, Link
from lepton_dist.coordinator.cluster_document import read_cluster, write_cluster
from lepton_dist.coordinator.decisions import replay
from tests.end_to_end.rig import MODEL, ROOT, generate, read_rows, write_rows
from tests.harness import Finished, run

PROMPTS = ROOT / "configs" / "examples" / "prompts.jsonl"
EXAMPLE = ROOT / "configs" / "clusters" / "example.yaml"


def start(folder: Path, plan: str, *options: str, source: Path = PROMPTS) -> tuple[Finished, Path]:
    (folder / "plan.yaml").write_text(plan)
    output = folder / "out.jsonl"
    words = generate(MODEL, source, output, "--plan", folder / "plan.yaml", "--max-tokens", "8", *options)
    return run(words, ranks=2, seconds=100), output


def write_here(path: Path) -> None:
    """The cluster of a job of two ranks on this node."""
    old = read_cluster(EXAMPLE)
    write_cluster(Cluster("here", old.ranks[:2], old.within_node, Link(1e-3, 1e8)), path)


def test_a_named_cluster_is_planned_for(tmp_path: Path) -> None:
    write_here(tmp_path / "here.yaml")
    job, output = start(tmp_path, "{mesh: auto, cluster: here.yaml, engine: {max_sequences: 8}}")
    assert job.returncode == 0, job.report()
    assert len(read_rows(output)) == len(PROMPTS.read_text().splitlines())
    for word in ("mesh: auto, planned for", "here: 2 rank(s)", "most time in", "replicas:", "max_sequences: 8"):
        assert word in job.stderr, job.report()
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["prior"] == "the cluster 'here'" and report["predicted_tokens_per_s"] > 0
    assert all(replica["errors"] and replica["predicted_s"] > 0 for replica in report["replicas"])


@pytest.mark.slow
def test_without_a_cluster_the_ranks_are_measured_first(tmp_path: Path) -> None:
    job, output = start(tmp_path, "mesh: auto\nprecision: {weights: int8}")
    assert job.returncode == 0 and job.left == (), job.report()
    assert "2 rank(s) were measured in" in job.stderr and "weights int8" in job.stderr, job.report()
    assert len(read_rows(output)) == len(PROMPTS.read_text().splitlines())
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["prior"] == "the cluster 'this job'"


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        ("{mesh: auto, cluster: absent.yaml}", "absent.yaml: cannot be read"),
        (f"{{mesh: auto, cluster: {EXAMPLE}}}", "ranks, the job 2: profile this job's"),
        (f"{{mesh: {{tp: 2}}, cluster: {EXAMPLE}}}", "ranks, the job 2: profile this job's"),
        ("{mesh: auto, cluster: small.yaml}", "bytes are missing"),
    ],
)
def test_a_cluster_that_does_not_fit_is_told(plan: str, word: str, tmp_path: Path) -> None:
    write_here(tmp_path / "small.yaml")
    text = (tmp_path / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(text.replace("memory_bytes: 68719476736", "memory_bytes: 1000000"))
    job, _ = start(tmp_path, plan)
    assert job.returncode == 2 and word in job.stderr and "Traceback" not in job.stderr, job.report()


def test_an_input_without_requests_has_no_plan(tmp_path: Path) -> None:
    write_here(tmp_path / "here.yaml")
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": ""}])
    job, _ = start(tmp_path, "{mesh: auto, cluster: here.yaml}", source=source)
    assert job.returncode == 2 and "holds no request" in job.stderr and "line 1" in job.stderr, job.report()


def test_the_decisions_of_a_run_can_be_replayed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": f"def f{i}(", "hint": 1 + i % 7} for i in range(40)])
    settings = {"model": str(MODEL), "input": "in.jsonl", "output": "out.jsonl", "decision_log": "log.jsonl"}
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "plan": "plan.yaml", "sampling": {"max_tokens": 8}}))
    (tmp_path / "plan.yaml").write_text("{mesh: {dp: 2}, engine: {max_sequences: 4}}")
    job = run(["-m", "lepton_dist.cli.main", "generate", "--config", tmp_path / "run.yaml"], ranks=2, seconds=60)
    assert job.returncode == 0, job.report()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    balancer = replay(lines)
    assert balancer.num_outstanding == 0
    assert sum(len(json.loads(line)[1]) for line in lines if line.startswith('["assign"')) >= 40
    assert (tmp_path / "log.jsonl").stat().st_mode & 0o077 == 0
    assert len(read_rows(tmp_path / "out.jsonl")) == len(read_rows(source)) == 40


def test_a_decision_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    settings = {"model": str(MODEL), "input": str(PROMPTS), "output": "out.jsonl", "decision_log": "absent/log.jsonl"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    job = run(["-m", "lepton_dist.cli.main", "generate", "--config", tmp_path / "run.yaml"], ranks=1, seconds=60)
    assert job.returncode == 2 and "decision log cannot be written" in job.stderr, job.report()
