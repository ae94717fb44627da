"""The shared window of one group inside a node: a page of flags and two slots for each rank.

Slots are small and used in turn, so /dev/shm stays small whatever the tensors, and a slot fits the caches.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

SLOT_BYTES = 1 << 20
SMALLEST_SLOT_BYTES = 64 << 10
_PAGE_BYTES = 4096
_LINE_BYTES = 64
# Part of the free /dev/shm that one group may take: a job opens several groups, and MPI itself uses it too.
_FREE_PART = 8


class ShmWindow:
    """The window's memory. For each rank: `arrived` and `reduced` flags (int64), and two slots of `slot_bytes`."""

    def __init__(self, win: MPI.Win, rank: int, size: int, slot_bytes: int) -> None:
        self._win = win
        self.rank, self.size, self.slot_bytes = rank, size, slot_bytes
        self.arrived: list[memoryview] = []
        self.reduced: list[memoryview] = []
        self.slots: list[list[Tensor]] = [[], []]  # [turn][rank] -> uint8 [slot_bytes]
        with torch.inference_mode(False):
            for peer in range(size):
                self._map(win.Shared_query(peer)[0].cast("B"))

    def _map(self, memory: memoryview) -> None:
        self.arrived.append(memory[:8].cast("q"))
        self.reduced.append(memory[_LINE_BYTES : _LINE_BYTES + 8].cast("q"))
        for turn in range(2):
            start = _PAGE_BYTES + turn * self.slot_bytes
            self.slots[turn].append(torch.from_numpy(np.frombuffer(memory, np.uint8, self.slot_bytes, start)))

    @property
    def fence(self) -> Callable[[], None] | None:
        """The memory barrier to call before setting and after seeing a flag; None on x86, which keeps the order."""
        return None if platform.machine() in ("x86_64", "AMD64") else self._win.Sync

    def close(self) -> None:
        """Give the memory back; collective over the group. The views must not be used afterwards."""
        self.arrived.clear()
        self.reduced.clear()
        self.slots.clear()
        self._win.Unlock_all()
        self._win.Free()


def open_window(comm: MPI.Intracomm, name: str) -> tuple[ShmWindow | None, str]:
    """A window for the ranks of `comm`, which share one node; collective. None and the reason when it cannot be had."""
    size = comm.Get_size()
    # All ranks must decide alike, so the first one looks at /dev/shm for them.
    decided = np.array([_affordable_slot(size)], np.int64)
    comm.Bcast(decided)
    slot_bytes = int(decided[0])
    if not slot_bytes:
        return None, (
            f"group {name!r} of {size} ranks goes without shared memory: /dev/shm has less than "
            f"{_FREE_PART * size * (2 * SMALLEST_SLOT_BYTES + _PAGE_BYTES)} bytes free; mount it larger"
        )
    win, reason = _allocate(comm, _PAGE_BYTES + 2 * slot_bytes)
    succeeded = np.array([win is not None], np.int8)
    comm.Allreduce(MPI.IN_PLACE, succeeded, MPI.MIN)
    if win is None or not succeeded[0]:
        return None, f"group {name!r} of {size} ranks goes without shared memory: MPI made no shared window ({reason})"
    win.Lock_all(MPI.MODE_NOCHECK)
    window = ShmWindow(win, comm.Get_rank(), size, slot_bytes)
    for turn in range(2):
        # Now, while there is room: memory of /dev/shm is found when it is first written, and a rank that finds none
        # left in the middle of a run dies of SIGBUS.
        window.slots[turn][window.rank].zero_()
    window.arrived[window.rank][0] = window.reduced[window.rank][0] = 0
    win.Sync()
    comm.Barrier()
    return window, ""


def _allocate(comm: MPI.Intracomm, num_bytes: int) -> tuple[MPI.Win | None, str]:
    try:
        return MPI.Win.Allocate_shared(num_bytes, 1, comm=comm), "another rank failed"
    except MPI.Exception as error:
        return None, error.Get_error_string()


def _affordable_slot(size: int) -> int:
    """The slot size that /dev/shm allows `size` ranks, or 0."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return 0
    budget = stat.f_bavail * stat.f_frsize // _FREE_PART
    slot_bytes = SLOT_BYTES
    while slot_bytes >= SMALLEST_SLOT_BYTES:
        if size * (_PAGE_BYTES + 2 * slot_bytes) <= budget:
            return slot_bytes
        slot_bytes //= 2
    return 0
