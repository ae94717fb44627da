"""`lepton-dist plan` as a user starts it: on a login node, into a file that `generate` and `inspect` read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lepton_dist.coordinator.cluster import Cluster, Link
from lepton_dist.coordinator.cluster_document import read_cluster, write_cluster
from lepton_dist.plan.document import load_plan
from tests.harness import Finished, run

_ROOT = Path(__file__).resolve().parents[2]
MODEL = _ROOT / "configs" / "examples" / "tiny-stdlib"
PROMPTS = _ROOT / "configs" / "examples" / "prompts.jsonl"
EXAMPLE = _ROOT / "configs" / "clusters" / "example.yaml"


def lepton(command: str, *more: object, ranks: int | None = None, seconds: float = 60) -> Finished:
    words = ["-m", "lepton_dist.cli.main", command, "--model", MODEL, *more]
    return run(words, ranks=ranks, seconds=seconds)


def plan(*more: object, cluster: Path = EXAMPLE, workload: object = "100,50") -> Finished:
    return lepton("plan", "--cluster", cluster, "--workload", workload, *more)


def test_a_plan_for_an_input_file_can_be_inspected(tmp_path: Path) -> None:
    output = tmp_path / "plan.yaml"
    job = plan("-o", output, "--max-tokens", "32", workload=PROMPTS)
    assert job.returncode == 0, job.report()
    for word in ("tokens/s", "error bar", "core-hours", "memory:", "simulated", "max_tokens"):
        assert word in job.stdout, job.report()
    written = load_plan(output)
    assert written.estimate["tokens_per_s"] > 0 and written.estimate["seconds"] > 0
    assert written.estimate["cluster"] == "example"
    seen = lepton("inspect", "--plan", output, "--ranks", "8")
    assert seen.returncode == 0, seen.report()


def test_without_an_output_the_plan_is_printed(tmp_path: Path) -> None:
    job = plan("--objective", "latency", "--weights", "int8")
    assert job.returncode == 0, job.report()
    text = tmp_path / "printed.yaml"
    text.write_text(job.stdout.split("plan 1 in full:\n")[1])
    assert load_plan(text).precision.weights == "int8"
    assert "seconds" not in load_plan(text).estimate


@pytest.mark.slow
def test_generate_obeys_what_plan_wrote(tmp_path: Path) -> None:
    old = read_cluster(EXAMPLE)
    here = tmp_path / "here.yaml"
    write_cluster(Cluster("here", old.ranks[:2], old.within_node, Link(1e-3, 1e8)), here)
    output, results = tmp_path / "plan.yaml", tmp_path / "results.jsonl"
    job = plan("-o", output, cluster=here, workload=PROMPTS)
    assert job.returncode == 0, job.report()
    options = ("--plan", output, "--input", PROMPTS, "--output", results, "--max-tokens", "8")
    done = lepton("generate", *options, ranks=2, seconds=90)
    assert done.returncode == 0, done.report()
    assert len(results.read_text().splitlines()) == len(PROMPTS.read_text().splitlines())


def test_lengths_instead_of_prompts_are_a_workload_too(tmp_path: Path) -> None:
    workload = tmp_path / "lengths.jsonl"
    workload.write_text(json.dumps({"prompt_tokens": 20, "output_tokens": 10, "count": 30}))
    job = plan(workload=workload)
    assert job.returncode == 0 and "30 requests of 20 prompt and 10 output" in job.stdout, job.report()


def test_bad_rows_are_told_and_left_out(tmp_path: Path) -> None:
    workload = tmp_path / "in.jsonl"
    workload.write_text('{"prompt": "def f("}\n{"prompt": 3}\n')
    job = plan(workload=workload)
    assert job.returncode == 0 and "1 bad row(s)" in job.stdout and "line 2" in job.stdout, job.report()


def test_a_model_that_fits_nowhere_says_by_how_much(tmp_path: Path) -> None:
    small = tmp_path / "small.yaml"
    text = EXAMPLE.read_text()
    for size in ("68719476736", "34359738368"):
        text = text.replace(size, str(1 << 20))
    small.write_text(text)
    job = plan(cluster=small)
    assert job.returncode == 2 and "bytes are missing" in job.stderr and "more rank(s)" in job.stderr, job.report()


@pytest.mark.parametrize(
    ("workload", "word"),
    [
        ("absent.jsonl", "cannot be read"),
        ("0,50", "at least 1 token"),
        ("4000,500", "the model's context holds"),
        ("", "holds no request"),
    ],
)
def test_a_bad_workload_is_told(workload: str, word: str, tmp_path: Path) -> None:
    given = workload
    if not workload:
        (tmp_path / "empty.jsonl").write_text("\n")
        given = str(tmp_path / "empty.jsonl")
    job = plan(workload=given)
    assert job.returncode == 2 and word in job.stderr and "Traceback" not in job.stderr, job.report()


def test_an_output_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job = plan("-o", tmp_path / "file" / "plan.yaml")
    assert job.returncode == 2 and "cannot be written" in job.stderr, job.report()


def test_a_number_below_one_is_told() -> None:
    job = plan("--max-sequences", "0")
    assert job.returncode == 2 and "--max-sequences is 0; it must be a whole number from 1" in job.stderr, job.report()
