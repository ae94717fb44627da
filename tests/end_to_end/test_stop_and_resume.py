"""Whatever stops a run, the same command goes on where it was: nothing lost, nothing twice, the same texts."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Undisturbed
from tests.end_to_end.rig import (
    MODEL,
    READY,
    SETTINGS,
    by_key,
    generate,
    launched,
    num_lines,
    plan,
    rank_pids,
    read_rows,
    wait_for,
    wait_for_guardian,
)
from tests.harness import Job, run, started

# Number of ranks and plan of each start, and whether the kill comes while it starts or while it writes rows.
STARTS = [
    (1, "dp: 1", "rows"),
    (2, "tp: 2", "start"),
    (3, "pp: 3", "rows"),
    (4, "dp: 2, tp: 2", "start"),
    (2, "pp: 2", "rows"),
]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def test_five_kills_of_the_whole_job(undisturbed: Undisturbed, tmp_path: Path) -> None:
    moments = random.Random(20)
    output = tmp_path / "out.jsonl"
    for ranks, mesh, phase in STARTS:
        before = num_lines(output)
        # Few rows at once, so that the kill meets the job among them however fast the machine is.
        engine = {"max_sequences": 2} if phase == "rows" else {}
        settings = plan(tmp_path / "plan.yaml", mesh, **engine)
        words = generate(MODEL, undisturbed.source, output, *SETTINGS, "--plan", settings)
        with started(words, ranks=ranks) as job:
            if phase == "rows":
                wait_for(lambda before=before: num_lines(output) > before, job, "more rows")
                time.sleep(moments.uniform(0.0, 0.6))
            else:
                time.sleep(moments.uniform(0.2, 4.0))
            assert job.process.poll() is None, job.stderr
            job.kill()
        if phase == "rows":
            assert before < num_lines(output) < len(undisturbed.rows)
    with output.open("ab") as file:
        file.write(b'{"id": 5, "text": "torn')
    words = generate(MODEL, undisturbed.source, output, *SETTINGS, "--plan", plan(tmp_path / "plan.yaml", "tp: 3"))
    last = run(words, ranks=3, seconds=120)
    assert last.returncode == 3 and last.left == (), last.report()
    assert by_key(read_rows(output)) == undisturbed.rows
    after = output.read_bytes()
    again = run(words, ranks=3, seconds=60)
    assert again.returncode == 3 and "was complete already" in again.stderr, again.report()
    assert output.read_bytes() == after


@pytest.fixture
def running(undisturbed: Undisturbed, tmp_path: Path) -> Iterator[tuple[Job, Path]]:
    """A job of two ranks under launch/mpirun that has written a row."""
    output = tmp_path / "out.jsonl"
    slow = plan(tmp_path / "plan.yaml", "tp: 2", max_sequences=4)
    with launched(2, generate(MODEL, undisturbed.source, output, *SETTINGS, "--plan", slow, "--grace", "0.5")) as job:
        wait_for(lambda: num_lines(output) >= 1, job, "the first row")
        yield job, output


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_with_75_and_whole_rows(
    running: tuple[Job, Path], number: signal.Signals, undisturbed: Undisturbed
) -> None:
    job, output = running
    os.kill(job.process.pid, number)
    end = job.wait(15)
    assert end.returncode == 75 and end.left == (), end.report()
    assert end.stderr.count("finishing what fits in 0.5 s; the same command resumes") == 1, end.report()
    rows = by_key(read_rows(output))
    assert 0 < len(rows) < len(undisturbed.rows)
    assert all(undisturbed.rows[key] == row for key, row in rows.items())


@pytest.mark.parametrize(("mesh", "stopped_s"), [("pp: 2", 7.0), pytest.param("tp: 2", 75.0, marks=pytest.mark.slow)])
def test_a_job_that_is_suspended_as_a_whole_goes_on(
    undisturbed: Undisturbed, tmp_path: Path, mesh: str, stopped_s: float
) -> None:
    """SLURM suspends jobs for longer than any deadline: here those are 3 s, and 63 s of the watchdog."""
    output = tmp_path / "out.jsonl"
    settings = plan(tmp_path / "plan.yaml", mesh, max_sequences=2, step_timeout_s=3, load_timeout_s=60)
    with started(generate(MODEL, undisturbed.source, output, *SETTINGS, "--plan", settings), ranks=2) as job:
        wait_for(lambda: num_lines(output) > 0, job, "the first row")
        for number, pause_s in ((signal.SIGSTOP, stopped_s), (signal.SIGCONT, 0.0)):
            for pid in job.pids():
                os.kill(pid, number)
            time.sleep(pause_s)
            assert job.process.poll() is None, job.stderr
        end = job.wait(120)
    assert end.returncode == 3 and not end.left, end.report()  # the input has bad rows
    assert by_key(read_rows(output)) == undisturbed.rows


def test_a_second_signal_leaves_at_once(undisturbed: Undisturbed, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with launched(2, generate(MODEL, undisturbed.source, output, *SETTINGS, "--grace", "60")) as job:
        wait_for(lambda: READY in job.stderr, job, "loaded")
        time.sleep(0.3)
        os.kill(job.process.pid, signal.SIGINT)
        wait_for(lambda: "finishing what fits" in job.stderr, job, "the first signal is heeded")
        start_s = time.monotonic()
        os.kill(job.process.pid, signal.SIGINT)
        end = job.wait(10)
    assert end.returncode == 75 and end.left == (), end.report()
    assert time.monotonic() - start_s < 3
    assert "leaving at once; the same command resumes" in end.stderr
    read_rows(output)


def test_a_signal_before_there_is_anything_to_finish_leaves_at_once(undisturbed: Undisturbed, tmp_path: Path) -> None:
    words = generate(MODEL, undisturbed.source, tmp_path / "out.jsonl", *SETTINGS)
    for seconds in (0.3, 0.7):  # torch alone takes longer to import; a fast machine has results after 1.5
        with launched(2, words) as job:
            for pid in rank_pids(job, 2):
                wait_for_guardian(job, pid)
            time.sleep(seconds)
            os.kill(job.process.pid, signal.SIGTERM)
            start_s = time.monotonic()
            end = job.wait(10)
        assert end.returncode == 75 and end.left == (), end.report()
        assert time.monotonic() - start_s < 3
        # Rank 0 says so, or, where the signal met it inside MPI's start, the wrapper.
        assert end.stderr.count("SIGUSR1: leaving") == 1 or "left at once, as asked" in end.stderr, end.report()


# A second rank that is slow to start: it dies of the signal, or sleeps through it and joins rank 0 afterwards.
LATE = {"dies": "sleep 60", "joins": "trap '' USR1; sleep 8; exec \"$@\""}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_a_signal_while_rank_0_waits_inside_the_start_of_mpi(
    undisturbed: Undisturbed, tmp_path: Path, late: str
) -> None:
    """There C waits for the other rank, and no handler of Python's runs."""
    words = generate(MODEL, undisturbed.source, tmp_path / "out.jsonl", *SETTINGS)
    other = [":", "-n", "1", "bash", "-c", late, "bash", sys.executable, *words]
    with launched(1, [*words, *other]) as job:
        wait_for_guardian(job, rank_pids(job, 1)[0])
        time.sleep(5)
        os.kill(job.process.pid, signal.SIGTERM)
        end = job.wait(20)
    assert end.returncode == 75 and end.left == (), end.report()


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in SIGNALS if number != signal.SIGINT)],
    ids=lambda number: number.name,
)
@pytest.mark.parametrize("ranks", [None, 2])
def test_without_a_wrapper(undisturbed: Undisturbed, tmp_path: Path, number: signal.Signals, ranks: int | None) -> None:
    """A signal to the job's whole process group, as a terminal sends Ctrl-C, to mpirun itself or to a process alone."""
    if ranks is not None and (Path(sys.executable).parent / "prterun").exists() and number != signal.SIGUSR1:
        pytest.skip("Open MPI's mpirun kills its ranks on SIGINT and SIGTERM: that is what launch/mpirun is for")
    words = generate(MODEL, undisturbed.source, tmp_path / "out.jsonl", *SETTINGS, "--grace", "0")
    with started(words, ranks=ranks) as job:
        wait_for(lambda: READY in job.stderr, job, "loaded")
        time.sleep(0.5)
        os.killpg(job.process.pid, number)
        end = job.wait(10)
    assert end.returncode == 75 and end.left == (), end.report()
    assert f"{number.name}: finishing what fits in 0 s" in end.stderr
    read_rows(tmp_path / "out.jsonl")
