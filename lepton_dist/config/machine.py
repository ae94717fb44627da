"""What this process may use of its machine: cores and memory, by the limits that clusters set."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

MASK_WORDS = 32  # 64-bit words of an affinity mask that ranks exchange: 2,048 cores


def asked_threads() -> int | None:
    """The threads that the job asks for: SLURM_CPUS_PER_TASK, then OMP_NUM_THREADS; None where neither is set."""
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def affinity_mask() -> list[int]:
    """The cores that this process may run on, as signed 64-bit words."""
    words = [0] * MASK_WORDS
    for core in os.sched_getaffinity(0):
        if core < MASK_WORDS * 64:
            words[core // 64] |= 1 << (core % 64)
    return [word - 2**64 if word >= 2**63 else word for word in words]


def fair_threads(masks: Sequence[Sequence[int]], mine: int) -> int:
    """The whole cores that rank `mine` gets when each core is shared evenly by the ranks of a node bound to it."""
    share = 0.0
    for index, word in enumerate(masks[mine]):
        for bit in range(64):
            if (word >> bit) & 1:
                share += 1 / sum((mask[index] >> bit) & 1 for mask in masks)
    return max(1, min(round(share), int(min(cpu_quota(), 1 << 30))))


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """The cores' worth of time that this process's control groups leave to all that is in them; infinite without one.

    A quota of a group holds for those inside of it too. In a container the group's own folder may be what is mounted.
    """
    found = [math.inf]
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in (mounted, mounted / "cpu", mounted / "unified"):
            inside = root / path.strip("/")
            found += [_quota(folder) for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
    return min(found)


def _quota(folder: Path) -> float:
    """Of one control group, of version 2 or 1."""
    words = _words(folder / "cpu.max")
    words = words or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
    is_limited = len(words) == 2 and all(word.isdigit() for word in words)
    return int(words[0]) / int(words[1]) if is_limited else math.inf


def available_bytes(ranks_on_node: int) -> int:
    """Memory that this rank may use: its share of what is free on the node, within the cgroup's and SLURM's limits."""
    free = psutil.virtual_memory().available
    for limit_path, used_path in (
        (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
        (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
    ):
        limit, used = _words(limit_path), _words(used_path)
        if limit and used and limit[0].isdigit() and used[0].isdigit():
            free = min(free, max(0, int(limit[0]) - int(used[0])))
    per_node = os.environ.get("SLURM_MEM_PER_NODE", "")
    if per_node.isdigit() and int(per_node) > 0:
        free = min(free, int(per_node) << 20)
    share = free // ranks_on_node
    per_cpu = os.environ.get("SLURM_MEM_PER_CPU", "")
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    if per_cpu.isdigit() and int(per_cpu) > 0 and cpus.isdigit():
        share = min(share, (int(per_cpu) << 20) * int(cpus))
    return share


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
