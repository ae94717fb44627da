"""What happens when a job goes wrong: each program runs under its own mpirun, and its end is examined."""

from __future__ import annotations

import re
import socket
import textwrap
import time
from pathlib import Path

import pytest

from tests.harness import Finished, mpirun, run, started

HEAD = """
import sys, time, torch
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.world import open_world
from lepton_dist.errors import LeptonError
world = open_world(Patience(1.0, "stepping"))
"""
HOST = socket.gethostname()


def program(body: str) -> list[str]:
    return ["-c", HEAD + textwrap.dedent(body)]


def run_lines(body: str, ranks: int, seconds: float = 40.0) -> tuple[Finished, str]:
    job = run(program(body), ranks=ranks, seconds=seconds)
    return job, job.stdout + job.stderr


@pytest.mark.parametrize("transport", ["shm", "mpi"])
def test_a_rank_that_does_not_join_is_named(transport: str) -> None:
    body = f"""
        from lepton_dist.comm.select import LAST_BUCKET, Choice, Table
        group = world.group(range(3), "layers")
        choice = Choice({transport!r}, "exchange")
        group.use_table(Table({{name: ((LAST_BUCKET, choice),) for name in group.table.rows}}))
        group.barrier()
        if world.rank == 2:
            time.sleep(30)
        try:
            group.all_reduce(torch.ones(8))
        except LeptonError as error:
            print(f"RANK {{world.rank}}: {{error}}", flush=True)
            time.sleep(1)
            world.abort(error.exit_code)
    """
    job, text = run_lines(body, ranks=3)
    assert job.returncode == 70, job.report()
    assert job.seconds < 20, job.report()
    for rank in (0, 1):
        # A launcher may put two ranks' texts on one line.
        lines = [part for part in re.split(r"(?=RANK \d)", text) if part.startswith(f"RANK {rank}: ")]
        assert len(lines) == 1, job.report()
        assert "while stepping: waited 1 s for all_reduce number" in lines[0]
        assert "of group 'layers'" in lines[0]
        assert f"rank 2 (host {HOST})" in lines[0] and "rank 1 (" not in lines[0] and "rank 0 (" not in lines[0]


def test_a_rank_that_waits_elsewhere_is_named_with_its_place() -> None:
    body = """
        from lepton_dist.comm.select import LAST_BUCKET, Choice, Table
        both, other = world.group(range(2), "both"), world.group(range(2), "other")
        for group in (both, other):
            group.use_table(Table({name: ((LAST_BUCKET, Choice("mpi")),) for name in group.table.rows}))
        if world.rank == 1:
            world.patience.seconds = 20
        try:
            (both if world.rank == 0 else other).barrier()
        except LeptonError as error:
            print(f"RANK {world.rank}: {error}", flush=True)
            world.abort(error.exit_code)
    """
    job, text = run_lines(body, ranks=2)
    assert job.returncode == 70, job.report()
    wanted = f"not arrived: rank 1 (host {HOST}) waits for barrier number 1 of group 'other' over mpi"
    assert wanted in text, job.report()


def test_a_rank_that_opens_no_group_is_named() -> None:
    body = """
        if world.rank == 1:
            time.sleep(30)
        try:
            world.group(range(2), "pair")
        except LeptonError as error:
            print(error, flush=True)
            world.abort(error.exit_code)
    """
    job, text = run_lines(body, ranks=2)
    assert job.returncode == 70, job.report()
    assert f"waited 1 s for the opening of group 'pair'; not arrived and not answering: rank 1 (host {HOST})" in text, (
        job.report()
    )


def test_a_message_that_never_comes_names_the_sender() -> None:
    body = """
        group = world.group(range(2), "stages")
        if world.rank == 1:
            time.sleep(30)
        try:
            group.irecv(torch.empty(4), 1, tag=7).wait()
        except LeptonError as error:
            print(error, flush=True)
            world.abort(error.exit_code)
    """
    job, text = run_lines(body, ranks=2)
    assert job.returncode == 70, job.report()
    assert f"irecv with tag 7 in group 'stages' from rank 1; the other side is rank 1 (host {HOST})" in text, (
        job.report()
    )


@pytest.mark.parametrize("fault", ["sys.exit(5)", "raise RuntimeError('boom')", "world.abort(75)"])
def test_no_way_out_leaves_processes_behind(fault: str) -> None:
    body = f"""
        group = world.group(range(2), "pair")
        if world.rank == 1:
            {fault}
        world.patience.seconds = 60
        group.all_reduce(torch.ones(8))
    """
    job = run(program(body), ranks=2, seconds=20)
    assert job.returncode not in (0, None) and job.left == (), job.report()
    if "abort" in fault:
        assert job.returncode == 75, job.report()


def test_closing_does_not_wait_for_a_lost_rank() -> None:
    body = """
        import lepton_dist.comm.transports.mpi_fabric as fabric
        fabric.CLOSING_SECONDS = 1.0
        if world.rank == 1:
            time.sleep(60)
        print("leaving", flush=True)
        world.close(70)
    """
    job, text = run_lines(body, ranks=2)
    assert job.returncode not in (0, None) and job.seconds < 20, job.report()
    assert text.count("leaving") == 1


def test_a_launcher_of_another_mpi_is_refused_with_both_names() -> None:
    job = run(program("print('not reached')"), env={"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"})
    assert job.returncode == 1 and "not reached" not in job.stdout, job.report()
    wanted = "this process was started by Open MPI's mpirun, as rank 0 of 4, but its library (MPICH"
    if "Open MPI" in job.stderr.split("but its library (")[-1][:20]:
        wanted = wanted.replace("(MPICH", "(Open MPI")
    assert wanted in job.stderr, job.report()
    assert "sees a world of 1. Start the job with the mpirun of" in job.stderr


def test_a_missing_mpi_library_is_an_error_that_says_how_to_get_one() -> None:
    job = run(program("print('not reached')"), ranks=2, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    assert job.returncode not in (0, None), job.report()
    assert "no MPI library can be loaded" in job.stderr and "MPI4PY_LIBMPI=" in job.stderr, job.report()


def test_one_process_needs_no_mpi() -> None:
    check = """
        group = world.group([0], "alone")
        assert group.all_reduce(torch.ones(2)).tolist() == [1, 1]
        mailbox = world.mailbox("self")
        mailbox.send(0, b"hello")
        assert mailbox.poll() == (0, b"hello") and mailbox.poll() is None
        world.close()
        assert "mpi4py" not in sys.modules
        print("size", world.size)
    """
    for ranks in (None, 1):
        job = run(program(check), ranks=ranks)
        assert job.returncode == 0 and "size 1" in job.stdout, job.report()


def test_importing_the_world_loads_neither_mpi_nor_numpy() -> None:
    job = run(["-c", "import sys, lepton_dist.comm.launcher; print('mpi4py' in sys.modules, 'torch' in sys.modules)"])
    assert job.stdout.split() == ["False", "False"], job.report()
    job = run(["-c", "import sys, lepton_dist.comm.world; print('mpi4py' in sys.modules)"])
    assert job.stdout.split() == ["False"], job.report()


def test_waiting_ranks_leave_the_cores_alone() -> None:
    """An idle mailbox loop, and a long wait in a collective: process time against wall time."""
    body = """
        from lepton_dist.comm.wait import Backoff
        group, mailbox = world.group(range(2), "pair"), world.mailbox("commands")
        world.patience.seconds = 30
        group.barrier()
        start, used = time.perf_counter(), time.process_time()
        backoff = Backoff()
        if world.rank == 0:
            time.sleep(2.5)
            mailbox.send(1, b"go")
        else:
            while mailbox.poll() is None:
                backoff.idle()
            wall = time.perf_counter() - start
            print("IDLE", (time.process_time() - used) / wall, flush=True)
        group.barrier()
        start, used = time.perf_counter(), time.process_time()
        if world.rank == 0:
            time.sleep(2.5)
        group.all_reduce(torch.ones(4))
        if world.rank == 1:
            print("WAIT", (time.process_time() - used) / (time.perf_counter() - start), flush=True)
        world.close()
    """
    job, text = run_lines(body, ranks=2)
    assert job.returncode == 0, job.report()
    shares = {name: float(value) for name, value in re.findall(r"(IDLE|WAIT) ([\d.e-]+)", text)}
    assert shares["IDLE"] < 0.03, job.report()
    # A rank that spins uses all of it. Slow and busy machines need more time for each look.
    assert shares["WAIT"] < 0.2, job.report()


def test_groups_work_without_shared_memory() -> None:
    body = """
        import lepton_dist.comm.transports.shm_window as shm_window
        shm_window._FREE_PART = 10**9
        group = world.group(range(2), "pair")
        assert group.transports == ("mpi",), group.transports
        assert group.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
        print("NOTICE", group.notices[0])
        world.close()
    """
    job, text = run_lines(body, ranks=2)
    assert job.returncode == 0, job.report()
    assert text.count("group 'pair' of 2 ranks goes without shared memory: /dev/shm has less than") == 2


def test_a_killed_job_leaves_no_shared_memory_behind() -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir())
    body = """
        group = world.group(range(2), "pair")
        group.barrier()
        print("READY", flush=True)
        time.sleep(60)
    """
    with started(program(body), ranks=2) as job:
        end = time.monotonic() + 30
        while job.stdout.count("READY") < 2:
            assert time.monotonic() < end, job.stderr
            time.sleep(0.05)
        job.kill()
    # Both MPIs leave the buffers of their own messages, whatever they ran: Open MPI's are named sm_segment, MPICH's
    # have 2 MiB for two ranks. A window of ours would have 4 MiB.
    left = [path for path in set(shared.iterdir()) - before if path.exists() and "sm_segment" not in path.name]
    assert sum(path.stat().st_size for path in left) < 3 << 20, left


def test_the_harness_finds_the_launcher_of_this_python() -> None:
    assert mpirun().exists()
