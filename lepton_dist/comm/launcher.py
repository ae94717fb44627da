"""What started this process: the launcher's variables, read once.

A launcher tells each process its rank and the size of the job before MPI does. We need both to know whether MPI is
wanted at all, and to see when the launcher and the MPI library belong to different MPIs: every process then
believes that it is alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lepton_dist.config.control_groups import cpu_quota

Kind = Literal["none", "mpich", "openmpi", "slurm", "pmix"]

# Step ids that SLURM gives to shells rather than to tasks: pending, extern, batch script, interactive salloc.
_SLURM_SHELL_STEPS = frozenset({"4294967293", "4294967292", "4294967291", "4294967290"})

# The launcher that belongs to each kind of MPI library, for error messages.
MATCHING_LAUNCHERS: Mapping[str, str] = {
    "mpich": "the mpirun of MPICH (mpirun --version names HYDRA), or srun --mpi=pmi2",
    "openmpi": "the mpirun of Open MPI (mpirun --version names Open MPI), or srun --mpi=pmix",
    "intel": "the mpirun of Intel MPI, or srun --mpi=pmi2",
    "unknown": "the mpirun that was installed together with this library",
}


@dataclass(frozen=True)
class Launcher:
    """How this process was started. `size` 0 means that the launcher does not tell; so does `local_rank` -1."""

    kind: Kind
    rank: int
    size: int
    local_rank: int = -1
    local_size: int = 0

    def describe(self) -> str:
        """A few words for error messages."""
        name = {
            "none": "no launcher",
            "mpich": "MPICH's mpirun (PMI)",
            "openmpi": "Open MPI's mpirun",
            "slurm": "srun",
            "pmix": "a PMIx launcher",
        }[self.kind]
        return name if self.kind == "none" else f"{name}, as rank {self.rank} of {self.size or 'unknown'}"


def read_launcher(environment: Mapping[str, str] | None = None) -> Launcher:
    """Read the launcher from `environment` (by default the process's own).

    mpirun inside a SLURM job starts its helpers through srun, so mpirun's variables go before SLURM's.
    """
    found = os.environ if environment is None else environment
    step = _slurm_step(found)
    if "OMPI_COMM_WORLD_SIZE" in found:
        return Launcher(
            "openmpi",
            _number(found, "OMPI_COMM_WORLD_RANK", 0),
            _number(found, "OMPI_COMM_WORLD_SIZE", 1),
            _number(found, "OMPI_COMM_WORLD_LOCAL_RANK", -1),
            _number(found, "OMPI_COMM_WORLD_LOCAL_SIZE", 0),
        )
    if "PMI_RANK" in found and "PMI_SIZE" in found:
        rank, size = _number(found, "PMI_RANK", 0), _number(found, "PMI_SIZE", 1)
        if step is not None and (step.rank, step.size) == (rank, size) and "MPI_LOCALRANKID" not in found:
            return step  # srun --mpi=pmi2 sets PMI's variables too
        return Launcher(
            "mpich", rank, size, _number(found, "MPI_LOCALRANKID", -1), _number(found, "MPI_LOCALNRANKS", 0)
        )
    if step is not None:
        return step
    if "PMIX_RANK" in found:
        return Launcher("pmix", _number(found, "PMIX_RANK", 0), 0)
    return Launcher("none", 0, 1, 0, 1)


@cache
def is_rationed() -> bool:
    """Whether the ranks of this node have less than a core each, by a quota. Asked once: quotas come with the job."""
    return cpu_quota() < max(read_launcher().local_size, 1)


def library_kind(version: str) -> str:
    """The key of `MATCHING_LAUNCHERS` for what MPI_Get_library_version says."""
    for mark, kind in (("Intel", "intel"), ("Open MPI", "openmpi"), ("MPICH", "mpich"), ("MVAPICH", "mpich")):
        if mark in version:
            return kind
    return "unknown"


def set_library_defaults(launcher: Launcher, version: str) -> None:
    """Give the MPI library the variables that it should find when it starts, unless the user has set them."""
    for name, value in library_defaults(launcher, version).items():
        os.environ.setdefault(name, value)


def library_defaults(launcher: Launcher, version: str) -> dict[str, str]:
    """The variables of `set_library_defaults`.

    `version` is what MPI_Get_library_version says. MPICH over UCX publishes each process's address as the 4,096 bytes
    that start there, whatever they hold, in lines that srun's PMI cuts at 1,024 characters: whether a job starts
    would depend on what else lies in memory. libfabric's addresses are a few bytes.
    """
    if launcher.kind == "slurm" and re.search(r"ch4:ucx\W+ofi", version):
        return {"MPIR_CVAR_CH4_NETMOD": "ofi"}
    return {}


def _slurm_step(found: Mapping[str, str]) -> Launcher | None:
    """The srun step of this process; None in a batch script or an salloc shell, which have SLURM_PROCID too."""
    if "SLURM_PROCID" not in found or "SLURM_STEP_NUM_TASKS" not in found:
        return None
    if found.get("SLURM_STEP_ID", "0") in _SLURM_SHELL_STEPS:
        return None
    size = _number(found, "SLURM_STEP_NUM_TASKS", 1)
    return Launcher("slurm", _number(found, "SLURM_PROCID", 0), size, _number(found, "SLURM_LOCALID", -1))


def _number(found: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(found.get(name, default))
    except ValueError:
        return default
