"""Peak memory of this host's ranks, without mapped file pages: those belong to every process that maps them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


class PeakMemory:
    """The peak of the process that needs most, from one `reset` to the next.

    Linux only: /proc/PID/status holds the peak of all resident pages (VmHWM), from which the file pages (RssFile) are
    taken off, and writing 5 to /proc/PID/clear_refs starts the peak anew. Elsewhere, and where this is forbidden,
    nothing is known.
    """

    def __init__(self, pids: list[int]) -> None:
        self._folders = [Path("/proc", str(pid)) for pid in pids]

    def reset(self) -> None:
        """Forget the peaks so far."""
        for folder in self._folders:
            try:
                (folder / "clear_refs").write_text("5")
            except OSError:
                self._folders = []
                return

    def bytes(self) -> int | None:
        """The largest peak of any process, or None where it is not known."""
        peaks = [_peak(folder) for folder in self._folders]
        return max((peak for peak in peaks if peak is not None), default=None)


def rank_pids(num_ranks: int) -> list[int]:
    """The processes of the job's ranks on this host: this one, and what its launcher started with the same words."""
    own = psutil.Process()
    parent = own.parent()
    if num_ranks == 1 or parent is None:
        return [own.pid]
    words = own.cmdline()
    pids = {own.pid}
    for process in parent.children():
        try:
            if process.cmdline() == words:
                pids.add(process.pid)
        except psutil.Error:
            continue  # it ended in between
    return sorted(pids)


def own_peak() -> PeakMemory:
    """Of this process alone."""
    return PeakMemory([os.getpid()])


def _peak(folder: Path) -> int | None:
    try:
        lines = (folder / "status").read_text().splitlines()
    except OSError:
        return None
    kibibytes = {name: value for name, _, value in (line.partition(":") for line in lines)}
    try:
        return (int(kibibytes["VmHWM"].split()[0]) - int(kibibytes["RssFile"].split()[0])) << 10
    except KeyError:
        return None
