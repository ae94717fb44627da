"""What control groups leave a process, read from files as kernels show them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lepton_dist.config.control_groups import cpu_quota, memory_left


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/job/rank1", {"job/rank1/cpu.max": "50000 100000"}, 0.5),
        ("0::/job/rank1", {"job/cpu.max": "150000 100000", "job/rank1/cpu.max": "max 100000"}, 1.5),
        ("0::/job/rank1", {"job/cpu.max": "150000 100000", "job/rank1/cpu.max": "20000 10000"}, 1.5),
        ("0::/docker/f00", {"cpu.max": "400000 100000"}, 4.0),  # a container sees its own folder as the root
        (
            "5:memory:/m\n1:cpu,cpuacct:/half",
            {"cpu/half/cpu.cfs_quota_us": "5000", "cpu/half/cpu.cfs_period_us": "10000"},
            0.5,
        ),
        ("1:cpu:/half", {"half/cpu.cfs_quota_us": "5000", "half/cpu.cfs_period_us": "10000"}, 0.5),
        ("1:cpu:/free", {"cpu/free/cpu.cfs_quota_us": "-1", "cpu/free/cpu.cfs_period_us": "10000"}, math.inf),
        ("3:cpuset:/half", {"half/cpu.max": "50000 100000"}, math.inf),  # of a group that has no say in time
        ("0::/", {}, math.inf),
    ],
)
def test_the_tightest_quota_counts(tmp_path: Path, groups: str, files: dict[str, str], cores: float) -> None:
    put(tmp_path / "groups", groups)
    for name, text in files.items():
        put(tmp_path / "mounted" / name, text)
    assert cpu_quota(tmp_path / "groups", tmp_path / "mounted") == cores


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/job/task", {"job/memory.max": "5000", "job/memory.current": "1000"}, 4000),
        (
            "0::/job/task",
            {
                "job/memory.max": "5000",
                "job/memory.current": "1000",
                "job/task/memory.max": "max",
                "job/task/memory.current": "10",
            },
            4000,
        ),
        ("0::/job", {"job/memory.max": "max", "job/memory.high": "700", "job/memory.current": "1000"}, 0),
        ("0::/docker/f00", {"memory.max": "5000", "memory.current": "1000"}, 4000),
        (
            "0::/",
            {
                "memory.max": "8000",
                "memory.current": "7900",
                "memory.stat": "anon 1900\nfile 6000\ninactive_file 4000\nactive_file 2000\nodd",
            },
            6100,
        ),
        (
            "4:memory:/slurm/job/step\n3:cpu:/x",
            {
                "memory/slurm/job/memory.limit_in_bytes": "5000",
                "memory/slurm/job/memory.usage_in_bytes": "4000",
                "memory/slurm/job/memory.stat": "inactive_file 1\ntotal_inactive_file 1500\ntotal_active_file 500",
                "memory/slurm/job/step/memory.limit_in_bytes": "9223372036854771712",
                "memory/slurm/job/step/memory.usage_in_bytes": "4000",
            },
            3000,
        ),
        ("0::/job", {"job/memory.max": "5000"}, math.inf),  # what is used is unknown
        ("nonsense", {}, math.inf),
    ],
)
def test_the_least_memory_left_counts_and_page_cache_is_free(
    tmp_path: Path, groups: str, files: dict[str, str], left: float
) -> None:
    put(tmp_path / "groups", groups)
    for name, text in files.items():
        put(tmp_path / "mounted" / name, text)
    assert memory_left(tmp_path / "groups", tmp_path / "mounted") == left


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) == memory_left(tmp_path / "none", tmp_path) == math.inf
