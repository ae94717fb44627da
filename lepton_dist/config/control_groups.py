"""What the control groups of this process leave it: a limit may stand in any group from its own up to the root.

SLURM, systemd and Kubernetes set limits above the group that a process is in. Version 1 has a tree a controller,
version 2 one tree for all. In a container the group's own folder may be what is mounted as the root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def cpu_quota(own: Path = _OWN, mounted: Path = _MOUNTED) -> float:
    """The cores' worth of time that the groups leave to all that is in them; infinite without a quota."""
    return min((_quota(folder) for folder in _folders("cpu", own, mounted)), default=math.inf)


def memory_left(own: Path = _OWN, mounted: Path = _MOUNTED) -> float:
    """The bytes that the groups still leave to all that is in them; infinite without a limit.

    Page cache counts as free: the kernel gives it back when a process wants memory.
    """
    return min((_left(folder) for folder in _folders("memory", own, mounted)), default=math.inf)


def _folders(controller: str, own: Path, mounted: Path) -> Iterator[Path]:
    """The folders of the process's group and of those around it; some may be absent."""
    for line in _lines(own):
        fields = line.split(":", 2)
        if len(fields) != 3 or (fields[1] and controller not in fields[1].split(",")):
            continue
        for root in (mounted, mounted / controller, mounted / (fields[1] or "unified"), mounted / "unified"):
            inside = root / fields[2].strip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(root))


def _quota(folder: Path) -> float:
    words = _words(folder / "cpu.max")
    words = words or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    is_limited = len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]) > 0
    return int(words[0]) / int(words[1]) if is_limited else math.inf


def _left(folder: Path) -> float:
    limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limit = min((one for one in limits if one is not None), default=None)
    used = _number(folder / "memory.current")
    used = _number(folder / "memory.usage_in_bytes") if used is None else used
    if limit is None or used is None:
        return math.inf
    return max(0, limit - max(0, used - _page_cache(folder)))


def _page_cache(folder: Path) -> int:
    """Of the group and all inside of it: version 1 names that ``total_...``, and its own part without."""
    pairs = (line.partition(" ") for line in _lines(folder / "memory.stat"))
    found = {name: int(value) for name, _, value in pairs if value.strip().isdigit()}
    prefix = "total_" if "total_inactive_file" in found else ""
    return found.get(f"{prefix}inactive_file", 0) + found.get(f"{prefix}active_file", 0)


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None  # "max" is none


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
