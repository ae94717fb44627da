"""One rank dies or is stopped: within seconds no process is left, its host has been named, and the job resumes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.blows import check_end, strike
from tests.end_to_end.conftest import Undisturbed
from tests.end_to_end.rig import (
    MODEL,
    READY,
    SETTINGS,
    by_key,
    copy_model,
    edit_header,
    edit_json,
    generate,
    launched,
    plan,
    rank_pids,
    read_rows,
    wait_for,
    write_rows,
)
from tests.harness import run, started


def finish(undisturbed: Undisturbed, output: Path) -> None:
    end = run(generate(MODEL, undisturbed.source, output, *SETTINGS), seconds=120)
    assert end.returncode == 3, end.report()
    assert by_key(read_rows(output)) == undisturbed.rows


def test_a_worker_killed_and_then_rank_0_stopped(undisturbed: Undisturbed, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    strike(undisturbed.source, output, plan(tmp_path / "a.yaml", "tp: 2"), signal.SIGKILL, 1, "decode")
    strike(undisturbed.source, output, plan(tmp_path / "b.yaml", "pp: 2"), signal.SIGSTOP, 0, "decode")
    finish(undisturbed, output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mesh", ["tp: 2", "pp: 2"])
def test_every_phase(undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals, victim: int, mesh: str) -> None:
    output = tmp_path / "out.jsonl"
    for phase in ("start", "prefill", "decode"):
        strike(undisturbed.source, output, plan(tmp_path / "plan.yaml", mesh), number, victim, phase)
    finish(undisturbed, output)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model with a vocabulary that takes a while to load: 1.5 GB, on disk a hole."""
    model = copy_model(tmp_path_factory.mktemp("large") / "model")
    vocab, width = 3_000_000, 256
    edit_json(model / "config.json", vocab_size=vocab)
    weights = model / "model.safetensors"

    def change(header: dict[str, dict[str, object]]) -> None:
        end = max(int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")  # type: ignore[index]
        embedding = header["model.embed_tokens.weight"]
        header["where it was"] = dict(embedding)
        embedding["shape"], embedding["data_offsets"] = [vocab, width], [end, end + vocab * width * 2]

    edit_header(weights, change)
    data_start = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    header = json.loads(weights.read_bytes()[8:data_start])
    os.truncate(weights, data_start + header["model.embed_tokens.weight"]["data_offsets"][1])
    return model


def is_reading(pid: int, path: Path) -> bool:
    """Whether a process has a file open, for longer than it takes to read a header."""
    if not has_open(pid, path):
        return False
    time.sleep(0.05)
    return has_open(pid, path)


def has_open(pid: int, path: Path) -> bool:
    try:
        return any(str(link.readlink()) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("mesh", ["tp: 2", "dp: 2"])
def test_while_loading(large_model: Path, tmp_path: Path, number: signal.Signals, victim: int, mesh: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "def f"}])
    words = generate(large_model, source, tmp_path / "out.jsonl", "--plan", plan(tmp_path / "plan.yaml", mesh))
    with launched(2, words) as job:
        pids = rank_pids(job, 2)
        weights = large_model / "model.safetensors"
        # With replicas one rank reads the large tensor, and the other waits for it.
        wait_for(lambda: any(is_reading(pid, weights) for pid in pids), job, "the weights are read")
        assert READY not in job.stderr
        os.kill(pids[victim], number)
        check_end(job, number, victim, pids[victim])


@pytest.mark.parametrize("through", ["launch/mpirun", "mpirun"])
def test_ranks_do_not_outlive_their_launcher(undisturbed: Undisturbed, tmp_path: Path, through: str) -> None:
    output = tmp_path / "out.jsonl"
    words = generate(MODEL, undisturbed.source, output, *SETTINGS)
    with launched(2, words) if through == "launch/mpirun" else started(words, ranks=2) as job:
        wait_for(lambda: READY in job.stderr, job, "loaded")
        os.kill(job.process.pid, signal.SIGKILL)
        start_s = time.monotonic()
        end = job.wait(10)
    assert end.left == () and time.monotonic() - start_s < 2.5, end.report()
