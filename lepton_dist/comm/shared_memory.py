"""Whether this node's /dev/shm is large enough for an MPI library to start."""

from __future__ import annotations

import os

from lepton_dist.comm.launcher import Launcher

# MPICH 5 died at its start with 1, 2 and 16 MiB, and did not with 4, 8, 32 and 64: below this it is not to be trusted.
_ENOUGH_BYTES = 32 << 20


def shortage(launcher: Launcher) -> str:
    """What to tell the user before MPI starts; empty where all is well, and on all ranks of a node but one.

    MPICH maps its shared memory without asking whether there is any, and dies of a signal that says nothing.
    """
    if launcher.kind not in ("mpich", "slurm") or launcher.size < 2 or launcher.local_rank > 0:
        return ""
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return ""
    left = free.f_bavail * free.f_frsize
    if left >= _ENOUGH_BYTES:
        return ""
    return (
        f"warning: /dev/shm has {left / 2**20:.0f} MiB free; below {_ENOUGH_BYTES >> 20} MiB MPI may die at its "
        "start (signal 7 or 11). Make it larger: mount -o remount,size=1G /dev/shm, or docker run --shm-size=1g"
    )
