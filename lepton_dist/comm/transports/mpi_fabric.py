"""The MPI fabric: MPI's start and end, who sits on which node, and the links of each group."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Sequence
from functools import cache
from typing import NoReturn

import mpi4py
import numpy as np

from lepton_dist.comm.launcher import MATCHING_LAUNCHERS, Launcher, library_kind, set_library_defaults
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import Links
from lepton_dist.errors import EXIT_FAILED, LaunchError, RankLostError

# MPI is started and ended by us: importing it must do neither. This has to come before the import of MPI itself.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise LaunchError(
        f"the job was started on several ranks, but no MPI library can be loaded: {error}. Install one "
        "(pip install 'lepton-dist[mpich]'), or name the site's own with MPI4PY_LIBMPI=/path/to/libmpi.so"
    ) from error

from lepton_dist.comm.transports.mpi import MpiTransport  # noqa: E402  after the settings above
from lepton_dist.comm.transports.mpi_post import MpiPost  # noqa: E402
from lepton_dist.comm.transports.roll_call import RollCall  # noqa: E402
from lepton_dist.comm.transports.shm import ShmTransport  # noqa: E402
from lepton_dist.comm.transports.shm_window import ShmWindow, open_window  # noqa: E402

_HOST_BYTES = 256
CLOSING_SECONDS = 10.0
_FORWARDING_SECONDS = 0.25


def start_mpi(launcher: Launcher, patience: Patience) -> MpiFabric:
    """Start MPI and look around.

    Raises:
        LaunchError: the library's world has another size than the launcher's job.
    """
    is_ours = not MPI.Is_initialized()
    if is_ours:
        set_library_defaults(launcher, MPI.Get_library_version())
        MPI.Init_thread(MPI.THREAD_SERIALIZED)  # one thread at a time, not always the same: see model/overlap.py
    version = MPI.Get_library_version().replace("\0", "").strip().splitlines()[0]
    size = MPI.COMM_WORLD.Get_size()
    if launcher.size not in (0, size):
        if is_ours:
            MPI.Finalize()
        right = MATCHING_LAUNCHERS[library_kind(version)]
        raise LaunchError(
            f"the launcher and the MPI library do not belong together: this process was started by "
            f"{launcher.describe()}, but its library ({version}) sees a world of {size}. Start the job with {right}"
        )
    return MpiFabric(patience, version, is_ours)


class MpiFabric:
    """What the world of a rank under MPI stands on."""

    def __init__(self, patience: Patience, library: str, is_ours: bool) -> None:
        # Never talk on COMM_WORLD itself: other libraries of the process may.
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.library = library
        self.serves_any_thread = MPI.Query_thread() >= MPI.THREAD_SERIALIZED
        self.hosts = self._gather_hosts()
        self.nodes = self._gather_nodes()
        self._patience, self._is_ours = patience, is_ours
        self._roll_call = RollCall(self._comm.Dup(), self.hosts, patience)
        self._windows: list[ShmWindow] = []
        self._links: dict[tuple[tuple[int, ...], str], Links] = {}

    def connect(self, members: Sequence[int], name: str) -> Links:
        """See `Fabric`. Members that come again under the same name get what connected them before.

        So a script that opens one session after another takes no more shared memory and no more communicators.
        """
        self._roll_call.meet(members, f"the opening of group {name!r}")
        key = tuple(members), name
        if key not in self._links:
            self._links[key] = self._connect(members, name)
        return self._links[key]

    def _connect(self, members: Sequence[int], name: str) -> Links:
        group = self._comm.Get_group().Incl(list(members))
        # The tag tells apart groups that overlapping sets of ranks open at the same time.
        comm = self._comm.Create_group(group, zlib.crc32(name.encode()) % 32768)
        group.Free()
        mpi = MpiTransport(comm, name, members, self._roll_call, self._patience)
        if len({self.nodes[rank] for rank in members}) > 1:
            return Links({"mpi": mpi}, mpi, takes_gpu_tensors=is_cuda_aware())
        window, notice = open_window(comm, name)
        if window is None:
            return Links({"mpi": mpi}, mpi, (notice,), is_cuda_aware())
        self._windows.append(window)
        shm = ShmTransport(window, name, members, self._roll_call, self._patience)
        return Links({"mpi": mpi, "shm": shm}, mpi, takes_gpu_tensors=is_cuda_aware())

    def post(self, name: str) -> MpiPost:
        """See `Fabric`."""
        self._roll_call.meet(range(self.size), f"the opening of mailbox {name!r}")
        return MpiPost(self._comm.Dup(), self._roll_call)

    def abort(self, code: int) -> NoReturn:
        """See `Fabric`."""
        sys.stdout.flush()
        sys.stderr.flush()
        # A launcher that hears of the abort drops what it has not read yet: give it time for the last message.
        time.sleep(_FORWARDING_SECONDS)
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)

    def close(self, code: int) -> None:
        """See `Fabric`. Ranks that do not come within `CLOSING_SECONDS` are left behind."""
        try:
            with self._patience.during("closing", CLOSING_SECONDS):
                self._roll_call.meet(range(self.size), "the end of the job")
        except RankLostError:
            # Not a silent exit: MPICH's proxy has been seen to miss that, and the ranks left behind would stay.
            self.abort(code or EXIT_FAILED)
        # From here on MPI blocks without a deadline, so a timer that makes no MPI call watches it.
        watchdog = threading.Timer(CLOSING_SECONDS, _leave, (code,))
        watchdog.daemon = True
        watchdog.start()
        for window in self._windows:
            window.close()
        if self._is_ours:
            MPI.Finalize()
        watchdog.cancel()

    def _gather_hosts(self) -> tuple[str, ...]:
        mine = np.zeros(_HOST_BYTES, np.uint8)
        name = socket.gethostname().encode()[:_HOST_BYTES]
        mine[: len(name)] = np.frombuffer(name, np.uint8)
        table = np.empty((self.size, _HOST_BYTES), np.uint8)
        self._comm.Allgather(mine, table)
        return tuple(row.tobytes().rstrip(b"\0").decode(errors="replace") for row in table)

    def _gather_nodes(self) -> tuple[int, ...]:
        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        leader = np.array([self.rank], np.int64)
        local.Bcast(leader)
        local.Free()
        leaders = np.empty(self.size, np.int64)
        self._comm.Allgather(leader, leaders)
        order = list(dict.fromkeys(leaders.tolist()))
        return tuple(order.index(value) for value in leaders.tolist())


@cache
def is_cuda_aware() -> bool:
    """Whether the MPI library says that it takes addresses in GPU memory. Ask when MPI has been started.

    `MPIX_Query_cuda_support` is an extension that Open MPI and MPICH share; a library without it takes none.
    """
    try:
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except (AttributeError, OSError):
        return False
    return bool(query() == 1)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
