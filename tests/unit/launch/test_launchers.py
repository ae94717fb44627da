"""launch/mpirun and launch/environment with stand-ins for what they start: exit codes, signals, settings, messages."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MPICH = "HYDRA build details:"
OPEN_MPI_5 = "mpirun (Open MPI) 5.0.11\n\nReport bugs to"
OPEN_MPI_4 = "mpirun (Open MPI) 4.1.4"

Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Starts launch/mpirun with a stand-in for mpirun: it answers --version, else runs a line of shell."""

    def start(body: str, *arguments: str, version: str = MPICH, **variables: str) -> subprocess.Popen[str]:
        stand_in = tmp_path / "mpirun"
        text = f"#!/bin/bash\nif [ $1 = --version ]; then echo '{version}'; exit; fi\n{body}\n"
        if not stand_in.exists() or stand_in.read_text() != text:
            stand_in.write_text(text)
            stand_in.chmod(0o755)
        return subprocess.Popen(
            [ROOT / "launch/mpirun", *arguments],
            env={"PATH": os.environ["PATH"], "MPIRUN": str(stand_in), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (2, 2), (3, 3), (75, 75), (70, 70), (1, 70), (9, 70), (143, 70)]
)
def test_exit_codes_say_whether_to_start_again(launch: Launch, code: int, expected: int) -> None:
    process = launch(f"exit {code}", "-n", "2", "program")
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == expected
    assert (f"ended with code {code};" in stderr) == (code not in {0, 2, 3, 75, 70})


def test_a_launcher_that_a_signal_ended_counts_as_failed(launch: Launch) -> None:
    process = launch("kill -KILL $$", "-n", "2", "program")
    assert "ended with code 137" in process.communicate(timeout=10)[1]
    assert process.returncode == 70


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_asks_to_stop_and_its_code_comes_back(launch: Launch, number: signal.Signals) -> None:
    body = "trap 'sleep 0.3; exit 75' USR1; echo up; while :; do sleep 0.02; done"
    process = launch(body, "-n", "2", "program")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(timeout=10) == 75


def test_the_second_signal_is_final(launch: Launch) -> None:
    body = "trap 'echo draining' USR1; trap 'exit 143' TERM; echo up; while :; do sleep 0.02; done"
    process = launch(body, "-n", "2", "program")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 75


def test_the_ranks_do_not_inherit_ignored_signals(launch: Launch) -> None:
    # A shell starts background commands with INT ignored; a rank's Python would then never see Ctrl-C.
    stdout, _ = launch("grep SigIgn /proc/self/status", "-n", "1", "program").communicate(timeout=10)
    assert int(stdout.split()[1], 16) & (1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)) == 0


def test_the_launcher_goes_when_the_wrapper_is_killed(launch: Launch) -> None:
    if subprocess.run(["setpriv", "--pdeathsig", "TERM", "true"], capture_output=True, check=False).returncode:
        pytest.skip("setpriv --pdeathsig is not there: util-linux 2.33 or newer has it")
    process = launch("trap 'echo gone; exit' TERM; echo up; while :; do sleep 0.02; done", "-n", "1", "program")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.kill()
    assert process.stdout.readline() == "gone\n"


def settings(process: subprocess.Popen[str]) -> dict[str, str]:
    """The MPI settings that the stand-in saw."""
    lines = process.communicate(timeout=10)[0].splitlines()
    pairs = dict(line.split("=", 1) for line in lines if line.startswith(("OMPI_", "PRTE_", "UCX_", "PMIX_")))
    return {name: value for name, value in pairs.items() if "RUN_AS_ROOT" not in name}


FABRIC = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp", "OMPI_MCA_osc": "^ucx"}
UNBOUND_5 = {"PRTE_MCA_hwloc_default_binding_policy": "none"}
UNBOUND_4 = {"OMPI_MCA_hwloc_base_binding_policy": "none"}
YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}
CROWDED_5 = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", **YIELD}
CROWDED_4 = {"OMPI_MCA_rmaps_base_oversubscribe": "1", **YIELD}


@pytest.mark.parametrize(
    ("version", "arguments", "expected"),
    [
        (MPICH, ("-n", "9999", "program"), {}),
        (OPEN_MPI_5, ("-n", "1", "program"), UNBOUND_5 | FABRIC),
        (OPEN_MPI_5, ("--map-by", "node", "-np", "9999", "bin/program"), UNBOUND_5 | FABRIC | CROWDED_5),
        (OPEN_MPI_4, ("-n", "1", "program"), UNBOUND_4),
        (OPEN_MPI_4, ("-n", "9999", "program"), UNBOUND_4 | CROWDED_4),
        (OPEN_MPI_5, ("--hostfile", "hosts", "-n", "9999", "program"), UNBOUND_5),
        (OPEN_MPI_5, ("-n", "1", "bin/program", "-n", "9999", "--host", "x"), UNBOUND_5 | FABRIC),
    ],
)
def test_each_mpi_gets_what_it_needs(
    launch: Launch, version: str, arguments: tuple[str, ...], expected: dict[str, str]
) -> None:
    assert settings(launch("env", *arguments, version=version)) == expected


def test_settings_of_the_user_stand_and_allocations_are_left_alone(launch: Launch) -> None:
    mine = {"OMPI_MCA_pml": "ucx", "PRTE_MCA_hwloc_default_binding_policy": "core"}
    assert settings(launch("env", "-n", "1", "program", version=OPEN_MPI_5, **mine)) == FABRIC | mine
    many = launch("env", "-n", "9999", "program", version=OPEN_MPI_5, SLURM_JOB_NUM_NODES="4")
    assert settings(many) == UNBOUND_5


def test_arguments_that_are_wrong_are_named(launch: Launch) -> None:
    process = launch("exit 0", "-n", "two", "program")
    assert "-n needs a number of ranks, not 'two'" in process.communicate(timeout=10)[1]
    assert process.returncode == 2


# What an environment is made from; when one of them changes it is made anew.
ENVIRONMENT_FILES = ("pyproject.toml", "constraints.txt", "lepton_dist/kernels/cpu/paged_attention.c")


def run_environment(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """launch/environment of a clone that holds nothing else."""
    for name in ("launch/environment", *ENVIRONMENT_FILES):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
        target.chmod(0o755)
    return subprocess.run(
        [tmp_path / "clone/launch/environment", *arguments],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('case "$*" in *version_info*) exit 1;; esac; echo Python 3.8.1', "is Python 3.8.1; 3.11 or newer is needed"),
        ('case "$*" in *ensurepip*) exit 1;; esac', "apt-get install python3-venv"),
    ],
)
def test_an_unusable_python_is_explained(tmp_path: Path, body: str, message: str) -> None:
    stand_in = tmp_path / "python3"
    stand_in.write_text(f"#!/bin/sh\n{body}\n")
    stand_in.chmod(0o755)
    done = run_environment(tmp_path, PYTHON=str(stand_in))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Set PYTHON" in done.stderr


def test_wrong_options_of_environment_are_named(tmp_path: Path) -> None:
    assert "mpich or openmpi, not 'lam'" in run_environment(tmp_path, "--mpi", "lam").stderr
    assert "unknown option '--fast'" in run_environment(tmp_path, "--fast").stderr


def test_a_finished_environment_is_found_at_once_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    nothing = str(tmp_path / "no-python")
    assert run_environment(tmp_path, PYTHON=nothing).returncode == 2
    clone = tmp_path / "clone"
    interpreter = clone / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text("#!/bin/sh\n")
    interpreter.chmod(0o755)
    files = subprocess.run(["cat", *ENVIRONMENT_FILES], cwd=clone, capture_output=True, check=True)
    versions = subprocess.run(["sha256sum"], input=files.stdout, capture_output=True, check=True).stdout.split()[0]
    stamp = clone / ".venv/.lepton-stamp"
    assert run_environment(tmp_path, PYTHON=nothing).returncode == 2  # no stamp: a set-up was killed half-way
    stamp.write_text(f"{versions.decode()}\n{clone}/.venv\nmpich test\n")
    start_s = time.monotonic()
    done = run_environment(tmp_path, "--with", "test", PYTHON=nothing)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{clone}/.venv\n", "")
    assert time.monotonic() - start_s < 2
    stamp.write_text(f"{versions.decode()}\n/elsewhere/.venv\nmpich test\n")  # the clone was moved
    assert run_environment(tmp_path, PYTHON=nothing).returncode == 2
