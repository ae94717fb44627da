"""What this process may use of its machine: cores and memory, by the limits that clusters set."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import psutil

from lepton_dist.config.control_groups import cpu_quota, memory_left

MASK_WORDS = 32  # 64-bit words of an affinity mask that ranks exchange: 2,048 cores


def asked_threads() -> int | None:
    """The threads that the job asks for: SLURM_CPUS_PER_TASK, then OMP_NUM_THREADS; None where neither is set.

    Of OpenMP's nested form, "4,2", the first number counts.
    """
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").split(",")[0].strip()
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


def useful_threads(asked: int, share: int) -> tuple[int, str]:
    """The threads to take where so many are asked for and `share` are this rank's fair ones; and a warning, or "".

    Threads beyond the cores that this process may run on only wait for one another.
    """
    cores = max(1, min(len(os.sched_getaffinity(0)), math.ceil(min(cpu_quota(), 1 << 30))))
    if asked <= cores:
        return asked, ""
    return share, (
        f"warning: {asked} threads are asked for where this rank may use {cores} core(s): it takes {share}; set "
        "--threads, SLURM_CPUS_PER_TASK or OMP_NUM_THREADS to what the allocation has"
    )


def fair_threads(masks: Sequence[Sequence[int]], mine: int) -> int:
    """The whole cores that rank `mine` gets when each core is shared evenly by the ranks of a node bound to it."""
    share = 0.0
    for index, word in enumerate(masks[mine]):
        for bit in range(64):
            if (word >> bit) & 1:
                share += 1 / sum((mask[index] >> bit) & 1 for mask in masks)
    return max(1, min(round(share), int(min(cpu_quota(), 1 << 30))))


def available_bytes(ranks_on_node: int) -> int:
    """Memory that this rank may use: its share of the node's free memory, within control groups and SLURM's limits."""
    free = int(min(psutil.virtual_memory().available, memory_left()))
    per_node = os.environ.get("SLURM_MEM_PER_NODE", "")
    if per_node.isdigit() and int(per_node) > 0:
        free = min(free, int(per_node) << 20)
    share = free // ranks_on_node
    per_cpu = os.environ.get("SLURM_MEM_PER_CPU", "")
    cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")
    if per_cpu.isdigit() and int(per_cpu) > 0 and cpus.isdigit():
        share = min(share, (int(per_cpu) << 20) * int(cpus))
    return share
