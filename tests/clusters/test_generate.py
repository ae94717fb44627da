"""`generate` over several hosts, with real traffic between them, and under a real SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters import netns, slurm
from tests.harness import run

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "configs" / "examples" / "tiny-stdlib"
BIN = Path(sys.executable).parent
COMMAND = (sys.executable, "-m", "lepton_dist.cli.main", "generate", "--model", str(MODEL), "--dtype", "float32")
OPTIONS = ("--threads", "1", "--temperature", "0", "--max-tokens", "24")


LONG = [(7 * i) % 4000 + 5 for i in range(200)]  # a step wide enough to be cut in two where sums cross the network


def write_input(folder: Path, rows: int = 6, prompt: list[int] | None = None) -> Path:
    """Rows of short prompts with a long one among them, or all of one prompt."""
    path = folder / "in.jsonl"
    prompts = [prompt or (LONG if n == 2 else [7 + n, 30, 200, 9]) for n in range(rows)]
    lines = [json.dumps({"id": n, "prompt_token_ids": ids, "ignore_eos": True}) for n, ids in enumerate(prompts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def results(path: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["text"] for row in rows}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What one rank makes of the input."""
    folder = tmp_path_factory.mktemp("alone")
    source = write_input(folder)
    done = run([*COMMAND[1:], "--input", source, "--output", folder / "out.jsonl", *OPTIONS])
    assert done.returncode == 0, done.report()
    return results(folder / "out.jsonl")


@pytest.fixture
def hosts() -> Iterator[netns.Hosts]:
    """Three network namespaces."""
    if reason := netns.reason_to_skip():
        pytest.skip(reason)
    with netns.network_hosts(3) as three:
        yield three


class TestHosts:
    """A rank on each of three hosts."""

    @pytest.mark.parametrize("mesh", [None, "tp: 3"])
    def test_equal_results_and_real_traffic(
        self, hosts: netns.Hosts, mesh: str | None, tmp_path: Path, expected: dict[int, str]
    ) -> None:
        source, output = write_input(tmp_path), tmp_path / "out.jsonl"
        words = [*COMMAND, "--input", str(source), "--output", str(output), *OPTIONS]
        if mesh:
            (tmp_path / "plan.yaml").write_text(f"mesh: {{{mesh}}}\n")
            words += ["--plan", str(tmp_path / "plan.yaml")]
        before = [hosts.sent_bytes(host) for host in hosts.names]
        run_on(hosts, 3, *words, seconds=90)
        sent = [hosts.sent_bytes(host) - count for host, count in zip(hosts.names, before, strict=True)]
        assert results(output) == expected
        # Every step's activations of 256 floats a token left the first host; commands are a few hundred bytes each.
        assert sent[0] > 6 * 24 * 256 * 4, sent

    @pytest.mark.parametrize(
        ("number", "mesh"),
        [
            (signal.SIGSTOP, "pp: 3"),
            pytest.param(signal.SIGKILL, "pp: 3", marks=pytest.mark.slow),
            (signal.SIGKILL, "tp: 3"),
        ],
    )
    def test_a_lost_rank_ends_the_job(
        self, hosts: netns.Hosts, number: signal.Signals, mesh: str, tmp_path: Path
    ) -> None:
        # Under tensor parallelism prompts without end: a thread of its own waits for the sums.
        is_wide = mesh.startswith("tp")
        source = write_input(tmp_path, 2000, LONG) if is_wide else write_input(tmp_path, 200)
        output, plan = tmp_path / "out.jsonl", tmp_path / "plan.yaml"
        plan.write_text(f"mesh: {{{mesh}}}\nengine: {{prefix_cache: false}}\n")
        words = [*COMMAND, "--input", str(source), "--output", str(output), "--plan", str(plan), "--threads", "1"]
        words += ["--max-tokens", "2" if is_wide else "200"]
        job = subprocess.Popen(
            hosts.mpirun(BIN, 3, *words), env=host_environment(hosts), stderr=subprocess.PIPE, text=True
        )
        try:
            pid = rank_pid(str(output), rank=2)
            wait_until(lambda: output.exists() and output.stat().st_size > 0)
            os.kill(pid, number)
            start = time.monotonic()
            _, errors = job.communicate(timeout=10)
        finally:
            job.kill()
        assert job.returncode != 0
        assert time.monotonic() - start < 10
        if number == signal.SIGSTOP:
            assert f"rank 2 on host {hosts.names[2]}" in errors, errors
        wait_until(lambda: not rank_pids(str(output)), seconds=5)


def host_environment(hosts: netns.Hosts) -> dict[str, str]:
    return {**hosts.environment(BIN), "PYTHONPATH": str(ROOT)}


def run_on(hosts: netns.Hosts, num_ranks: int, *words: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run ranks over the hosts, to a good end."""
    done = subprocess.run(
        hosts.mpirun(BIN, num_ranks, *words),
        env=host_environment(hosts),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def rank_pids(word: str) -> dict[int, int]:
    """Ranks to process ids of the ranks that have `word` among their arguments."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [value[9:] for value in variables if value.startswith(b"PMI_RANK=")]
        if ranks and word.encode() in words and words[0].endswith(b"python"):
            found[int(ranks[0])] = int(entry.name)
    return found


def rank_pid(word: str, rank: int) -> int:
    wait_until(lambda: rank in rank_pids(word))
    return rank_pids(word)[rank]


def wait_until(is_so: Callable[[], bool], seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_srun(tmp_path: Path, expected: dict[int, str]) -> None:
    """A rank on each of three nodes of a slurmctld of our own, through launch/srun."""
    if reason := slurm.reason_to_skip():
        pytest.skip(reason)
    source, output = write_input(tmp_path), tmp_path / "out.jsonl"
    words = [*COMMAND, "--input", str(source), "--output", str(output), *OPTIONS]
    variables = {"VIRTUAL_ENV": str(BIN.parent), "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with slurm.slurm_cluster(3, 1) as cluster:
        kind = "pmix" if netns.is_open_mpi(BIN) else "pmi2"
        probe = cluster.run("srun", f"--mpi={kind}", "true")
        if probe.returncode:
            pytest.skip(f"srun --mpi={kind} does not work here: {probe.stderr.splitlines()[0]}")
        done = cluster.run(str(ROOT / "launch/srun"), "-N", "3", "-n", "3", *words, timeout_s=90, **variables)
    assert done.returncode == 0, done.stderr
    assert results(output) == expected
