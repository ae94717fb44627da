"""`generate` on a real SLURM while things happen to it: signals, a dead rank, the end of the walltime."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clusters import netns, slurm
from tests.end_to_end.rig import GENERATE, MODEL, Row, arguments, by_key, num_lines, read_rows, write_rows
from tests.harness import run

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NUM_ROWS = 60
SETTINGS = ("--dtype", "float32", "--temperature", "0", "--max-tokens", "60", "--threads", "1", "--grace", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    if reason := slurm.reason_to_skip():
        pytest.skip(reason)
    with slurm.slurm_cluster(num_nodes=3, cpus_per_node=2) as three:
        kind = "pmix" if netns.is_open_mpi(BIN) else "pmi2"
        probe = three.run("srun", f"--mpi={kind}", "true")
        if probe.returncode:
            pytest.skip(f"srun --mpi={kind} does not work here (is libpmix-dev there?): {probe.stderr.splitlines()[0]}")
        yield three


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"id": n, "prompt_token_ids": [7 + n, 30, 200, 9], "ignore_eos": True} for n in range(NUM_ROWS)]
    return write_rows(tmp_path_factory.mktemp("input") / "in.jsonl", rows)


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, Row]:
    """What one rank makes of the input."""
    output = source.with_name("alone.jsonl")
    done = run([*GENERATE, *arguments(MODEL, source, output, *SETTINGS)])
    assert done.returncode == 0, done.report()
    return by_key(read_rows(output))


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Few sequences at a time, so that there is time to disturb the run."""
    path = tmp_path / "plan.yaml"
    path.write_text("mesh: {pp: 3}\nengine: {max_sequences: 2}\n")
    return path


@contextmanager
def srun(
    cluster: slurm.Slurm, num_tasks: int, source: Path, output: Path, *options: str | Path
) -> Iterator[subprocess.Popen[str]]:
    """A running `launch/srun` over as many nodes as tasks."""
    words = [sys.executable, *GENERATE, *arguments(MODEL, source, output, *SETTINGS, *options)]
    process = subprocess.Popen(
        [ROOT / "launch/srun", "-N", str(num_tasks), "-n", str(num_tasks), *words],
        env={**cluster.environment, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)
        cluster.run("scancel", "-f", "-u", "root")


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def rank_pids(output: Path) -> list[int]:
    """The processes that write or help to write an output, in order of rank."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes()
        except OSError:
            continue  # no process, or gone in between
        rank = re.search(rb"\0SLURM_PROCID=(\d+)", variables)
        if rank and words[0].endswith(b"python") and str(output).encode() in words:
            found[int(rank[1])] = int(entry.name)
    return [pid for _, pid in sorted(found.items())]


def signal_twice(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)


def test_signals_and_a_dead_rank(
    cluster: slurm.Slurm, source: Path, expected: dict[str, Row], plan: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"

    def disturb(blow: Callable[[subprocess.Popen[str]], object]) -> tuple[int, str]:
        before = num_lines(output)
        with srun(cluster, 3, source, output, "--plan", plan) as process:
            wait_until(lambda: num_lines(output) > before or process.poll() is not None, "no more rows")
            blow(process)
            text, _ = process.communicate(timeout=15)
        wait_until(lambda: not rank_pids(output), "ranks are left behind", 5)
        rows = by_key(read_rows(output))
        assert before < len(rows) < NUM_ROWS, text
        return process.returncode, text

    code, text = disturb(lambda process: process.send_signal(signal.SIGTERM))
    assert code == 75 and text.count("finishing what fits in 1 s") == 1, text
    code, text = disturb(lambda process: cluster.run("scancel", "--signal=TERM", "-u", "root"))
    assert code == 75 and text.count("SIGTERM: finishing what fits in 1 s") == 1, text
    code, text = disturb(signal_twice)
    assert code == 75 and "left at once, as asked" in text, text
    code, text = disturb(lambda process: os.kill(rank_pids(output)[1], signal.SIGKILL))
    assert code == 70 and re.search(r"node\d: task 1: Killed", text), text
    with srun(cluster, 2, source, output) as process:
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert by_key(read_rows(output)) == expected


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_batch_script_survives_its_walltime(
    cluster: slurm.Slurm, source: Path, expected: dict[str, Row], plan: Path, tmp_path: Path, launcher: str
) -> None:
    bin_folder = tmp_path / "venv/bin"
    bin_folder.mkdir(parents=True)
    for name, words in {"lepton-dist": f"{sys.executable} -m {GENERATE[1]}", "mpirun": f"{BIN}/mpirun"}.items():
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (bin_folder / name).chmod(0o755)
    output, log = tmp_path / "out.jsonl", tmp_path / "job.log"
    variables = {
        "MODEL": str(MODEL),
        "INPUT": str(source),
        "OUTPUT": str(output),
        "PLAN": str(plan),
        "OPTIONS": " ".join(SETTINGS),
        "VENV": str(bin_folder.parent),
        "LAUNCHER": launcher,
        "PYTHONPATH": str(ROOT),
    }
    options = ("--parsable", "--nodes=3", "--cpus-per-task=1", f"--output={log}")
    submitted = cluster.run("sbatch", *options, str(ROOT / "slurm/generate.sbatch"), cwd=ROOT, **variables)
    job = submitted.stdout.strip()
    assert job, submitted.stderr
    wait_until(lambda: num_lines(output) > 0, f"no rows: {log.read_text() if log.exists() else ''}")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1 does before the walltime
    wait_until(lambda: f"queued again as job {job}" in log.read_text(), log.read_text())
    kept = read_rows(output)
    assert 0 < len(kept) < NUM_ROWS
    wait_until(lambda: ": done, " in log.read_text(), f"it did not finish: {log.read_text()}", 90)
    rows = read_rows(output)
    assert rows[: len(kept)] == kept
    assert by_key(rows) == expected
