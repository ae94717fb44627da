"""What the environment says about the launcher."""

from __future__ import annotations

import pytest

from lepton_dist.comm.launcher import Launcher, library_defaults, library_kind, read_launcher
from lepton_dist.comm.shared_memory import shortage

HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "PMIX_RANK": "1",
}
STEP = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, Launcher("none", 0, 1, 0, 1)),
        (HYDRA, Launcher("mpich", 2, 4, 0, 2)),
        (OPENMPI, Launcher("openmpi", 1, 3, 1, 3)),
        (STEP, Launcher("slurm", 5, 8, 1)),
        # srun --mpi=pmi2 sets PMI's variables, srun --mpi=pmix PMIX_RANK
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "8"}, Launcher("slurm", 5, 8, 1)),
        ({**STEP, "PMIX_RANK": "5"}, Launcher("slurm", 5, 8, 1)),
        # mpirun starts its helpers by srun, one a node
        ({**HYDRA, **STEP, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Launcher("mpich", 2, 4, 0, 2)),
        ({**OPENMPI, **STEP}, Launcher("openmpi", 1, 3, 1, 3)),
        # a batch script, and an interactive shell of salloc: nothing was started on several ranks
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, Launcher("none", 0, 1, 0, 1)),
        ({**STEP, "SLURM_STEP_ID": "4294967290"}, Launcher("none", 0, 1, 0, 1)),
        ({"PMIX_RANK": "3"}, Launcher("pmix", 3, 0)),
        ({"PMI_RANK": "x", "PMI_SIZE": "2"}, Launcher("mpich", 0, 2)),
    ],
)
def test_read_launcher(found: dict[str, str], wanted: Launcher) -> None:
    assert read_launcher(found) == wanted


def test_descriptions() -> None:
    assert read_launcher(OPENMPI).describe() == "Open MPI's mpirun, as rank 1 of 3"
    assert read_launcher({}).describe() == "no launcher"
    assert read_launcher({"PMIX_RANK": "3"}).describe() == "a PMIx launcher, as rank 3 of unknown"


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("MPICH Version:      5.0.2", "mpich"),
        ("Open MPI v5.0.11, package: Open MPI root@x", "openmpi"),
        ("Intel(R) MPI Library 2021.15 for Linux* OS", "intel"),
        ("MPI of a vendor", "unknown"),
    ],
)
def test_library_kind(version: str, wanted: str) -> None:
    assert library_kind(version) == wanted


def test_only_the_mpich_wheel_under_srun_leaves_ucx() -> None:
    wheel = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH CC:           cc\n"
    srun, hydra = read_launcher(STEP), read_launcher(HYDRA)
    assert library_defaults(srun, wheel) == {"MPIR_CVAR_CH4_NETMOD": "ofi"}
    assert library_defaults(hydra, wheel) == {}
    assert library_defaults(srun, wheel.replace("ch4:ucx ofi", "ch4:ucx")) == {}
    assert library_defaults(srun, "Open MPI v5.0.11, package: Open MPI root@x") == {}


def test_little_shared_memory_is_told_once_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        f_bavail, f_frsize = 4096, 4096

    monkeypatch.setattr("lepton_dist.comm.shared_memory.os.statvfs", lambda path: Free)
    assert "/dev/shm has 16 MiB free" in shortage(Launcher("mpich", 2, 4, 0, 2))
    for other in (Launcher("mpich", 3, 4, 1, 2), Launcher("none", 0, 1, 0, 1), Launcher("openmpi", 0, 2, 0, 2)):
        assert not shortage(other)
    Free.f_bavail = 8192
    assert not shortage(Launcher("mpich", 2, 4, 0, 2))
