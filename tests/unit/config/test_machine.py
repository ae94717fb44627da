"""What control groups leave a process, read from files as kernels show them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lepton_dist.config.machine import cpu_quota


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


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) == math.inf
