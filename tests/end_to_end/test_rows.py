"""Bad rows become error rows and stop nothing; a full disk, another run's output and a second writer stop in order."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.rig import (
    GENERATE,
    MODEL,
    ROOT,
    arguments,
    by_key,
    copy_model,
    generate,
    num_lines,
    read_rows,
    wait_for,
    write_rows,
)
from tests.end_to_end.rig import plan as write_plan
from tests.harness import environment, run, started

OPTIONS = ("--max-tokens", "4", "--temperature", "0", "--threads", "1")
GOOD = {"id": "good", "prompt": "import os\n"}


@pytest.mark.parametrize("ranks", [None, 2])
def test_every_bad_row_is_answered_and_the_rest_is_done(ranks: int | None, tmp_path: Path) -> None:
    rows = [
        GOOD,
        b'{"id": "torn", "prompt": "x\n',
        b'{"id": "latin", "prompt": "caf\xe9"}\n',
        {"id": "empty", "prompt": ""},
        {"id": "none"},
        {"id": "long", "prompt_token_ids": [5] * 2048},
        {"id": "unknown token", "prompt_token_ids": [4096]},
        {"id": "hot", "prompt": "x", "temperature": 9},
        {"id": "typed", "prompt": 3},
        {"id": "good", "prompt": "the same id again"},
        {"id": "fields", "prompt": "x", "max_token": 3},
        b"\n",
        {"id": 7, "prompt_token_ids": [4095, 5]},
    ]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    job = run(generate(MODEL, source, output, *OPTIONS), ranks=ranks)
    assert job.returncode == 3 and not job.left, job.report()
    assert "Traceback" not in job.stderr
    found = by_key(read_rows(output))
    assert {key for key, row in found.items() if "error" not in row} == {"'good'", "7"}
    words = {
        "line 2": "JSON",
        "line 3": "UTF-8",
        "'empty'": "empty",
        "'none'": "prompt",
        "'long'": "2048",
        "'unknown token'": "4096",
        "'hot'": "temperature",
        "'typed'": "prompt",
        "line 10": "id",
        "'fields'": "max_token",
    }
    for key, word in words.items():
        assert word in found[key]["error"]["message"], found[key]
    assert len(found) == len(words) + 2


def test_a_request_beyond_the_cache_is_an_error_row(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [GOOD, {"id": 1, "prompt_token_ids": [5] * 60, "max_tokens": 30}])
    plan = write_plan(tmp_path / "plan.yaml", "tp: 1", kv_cache_bytes="200KiB")
    job = run(generate(MODEL, source, tmp_path / "out.jsonl", *OPTIONS, "--plan", plan))
    assert job.returncode == 3, job.report()
    message = by_key(read_rows(tmp_path / "out.jsonl"))["1"]["error"]["message"]
    assert "90 tokens" in message and "kv_cache_bytes" in message


def test_rows_of_text_need_a_tokenizer_and_rows_of_ids_do_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in MODEL.iterdir():
        if not file.name.startswith("tokenizer"):
            (model / file.name).symlink_to(file)
    ids = write_rows(tmp_path / "ids.jsonl", [{"id": 1, "prompt_token_ids": [5, 6]}])
    job = run(generate(model, ids, tmp_path / "a.jsonl", *OPTIONS))
    assert job.returncode == 0, job.report()
    assert len(read_rows(tmp_path / "a.jsonl")[0]["token_ids"]) == 4
    job = run(generate(model, write_rows(tmp_path / "text.jsonl", [GOOD]), tmp_path / "b.jsonl", *OPTIONS))
    assert job.returncode == 2 and "tokenizer.json" in job.stderr and "Traceback" not in job.stderr, job.report()


def test_a_full_disk_stops_in_order_and_the_run_resumes(tmp_path: Path) -> None:
    rows = [{"id": n, "prompt_token_ids": [5 + n], "ignore_eos": True} for n in range(40)]
    source, output = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = [sys.executable, *GENERATE, *arguments(MODEL, source, output, *OPTIONS)]

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    full = subprocess.run(
        words,
        env=environment(),
        cwd=ROOT,
        preexec_fn=few_bytes,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert full.returncode == 75, full.stderr
    assert "Traceback" not in full.stderr
    kept = read_rows(output)
    assert len(kept) < 40
    job = run(generate(MODEL, source, output, *OPTIONS), ranks=2)
    assert job.returncode == 0, job.report()
    rows_now = read_rows(output)
    assert rows_now[: len(kept)] == kept and len(by_key(rows_now)) == 40


def test_rows_are_corrected_and_added_where_there_is_no_answer_yet(tmp_path: Path) -> None:
    good, bad = {"id": 1, "prompt": "import os\n"}, {"id": 2, "prompt": "def f(", "temperature": 9}
    source, output = write_rows(tmp_path / "in.jsonl", [good, bad]), tmp_path / "out.jsonl"
    assert run(generate(MODEL, source, output, *OPTIONS)).returncode == 3
    answer = by_key(read_rows(output))["1"]
    write_rows(source, [good, {**bad, "temperature": 0.9}, {"id": 3, "prompt": "x"}])
    forgotten = run(generate(MODEL, source, output, *OPTIONS))
    assert forgotten.returncode == 2 and "1 row(s) of the input that have changed" in forgotten.stderr
    assert "--retry-errors" in forgotten.stderr and len(read_rows(output)) == 2
    assert run(generate(MODEL, source, output, *OPTIONS, "--retry-errors")).returncode == 0
    rows = by_key(read_rows(output))
    assert rows["1"] == answer and {"1", "2", "3"} == set(rows) and not any("error" in row for row in rows.values())
    write_rows(source, [{**good, "prompt": "import re\n"}, bad])
    changed = run(generate(MODEL, source, output, *OPTIONS))
    assert changed.returncode == 2 and "2 row(s) of the input that have changed" in changed.stderr, changed.report()


def test_results_may_lie_in_the_models_directory(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "mini")
    body = {"prompt": "import os\n", "max_tokens": 2}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    source = write_rows(model / "in.jsonl", [row])
    for output in ("results.jsonl", "results.json"):
        for _ in range(2):  # the second start finds what the first has left there, and resumes
            job = run(generate(Path(), source, Path(output)), cwd=model)
            assert job.returncode == 0, job.report()
        assert read_rows(model / output)[0]["response"]["body"]["model"] == "mini"


def test_an_output_belongs_to_one_run_and_one_writer(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [GOOD])
    output = tmp_path / "out.jsonl"
    assert run(generate(MODEL, source, output, *OPTIONS)).returncode == 0
    before = output.read_bytes()
    other = run(generate(MODEL, source, output, "--max-tokens", "5", "--temperature", "0"))
    assert other.returncode == 2 and "max_tokens" in other.stderr and "--overwrite" in other.stderr, other.report()
    assert output.read_bytes() == before
    assert json.loads(Path(f"{output}.job.json").read_text())["state"] == "complete"

    many = [{"id": n, "prompt_token_ids": [5 + n], "ignore_eos": True, "max_tokens": 400} for n in range(300)]
    busy = write_rows(tmp_path / "busy.jsonl", many)
    plan = write_plan(tmp_path / "plan.yaml", "tp: 2", max_sequences=2)  # so that the first row comes soon
    with started(generate(MODEL, busy, tmp_path / "busy.out", "--threads", "1", "--plan", plan), ranks=2) as writer:
        wait_for(lambda: num_lines(tmp_path / "busy.out") > 0, writer, "the first row")
        second = run(generate(MODEL, busy, tmp_path / "busy.out", "--threads", "1"))
        assert second.returncode == 2 and "busy.out" in second.stderr, second.report()
        assert writer.process.poll() is None, writer.stderr
