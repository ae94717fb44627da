"""Ways to slow a rank down: busy neighbours on its core, or a quota of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PERIOD_US = 10_000

# Busy until the process that started it is gone, however that ended.
_BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    sum(range(10**5))"


class Neighbours:
    """Busy processes on a core, each a session of its own: with n of them a rank there gets 1 / (n + 1) of it."""

    def __init__(self, core: int) -> None:
        self._core = core
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, count: int) -> None:
        command = ["taskset", "-c", str(self._core), sys.executable, "-c", _BUSY, str(os.getpid())]
        self._processes += [subprocess.Popen(command, start_new_session=True) for _ in range(count)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes.clear()


@contextmanager
def slowed(core: int, count: int) -> Iterator[Neighbours]:
    neighbours = Neighbours(core)
    try:
        neighbours.start(count)
        yield neighbours
    finally:
        neighbours.stop()


@contextmanager
def half_speed() -> Iterator[str]:
    """This process, which is kept on one core, at half its speed; how that was done."""
    _show_groups()
    group = _make_group()
    if group is None:
        (core,) = os.sched_getaffinity(0)
        with slowed(core, 1):
            yield "a busy neighbour"
        return
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield "a quota of 5 ms in 10 ms"
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _make_group() -> Path | None:
    """A control group (version 1 or 2) with the quota; None where that is not allowed."""
    first = {"cpu.cfs_period_us": f"{_PERIOD_US}", "cpu.cfs_quota_us": f"{_PERIOD_US // 2}"}
    second = {"cpu.max": f"{_PERIOD_US // 2} {_PERIOD_US}"}
    for root, files in (("/sys/fs/cgroup/cpu", first), ("/sys/fs/cgroup", second), ("/sys/fs/cgroup", first)):
        group = Path(root, f"lepton-shares-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in files.items():
                if not (group / name).exists():
                    raise OSError(name)
                (group / name).write_text(value)
            return group
        except OSError:
            group.rmdir()
    return None


def _show_groups() -> None:
    """Mount them inside of `ip netns exec`, which gives a process a bare /sys, and mounts of its own."""
    root, ip = Path("/sys/fs/cgroup"), shutil.which("ip")
    if ip is None or not root.is_dir() or any(root.iterdir()):
        return
    found = subprocess.run([ip, "netns", "identify", str(os.getpid())], capture_output=True, text=True, check=False)
    if not found.stdout.strip():
        return  # elsewhere the machine's own mounts would change
    for kind in (["cgroup", "-o", "cpu"], ["cgroup2"]):
        words = ["mount", "-t", *kind, "none", str(root)]
        if subprocess.run(words, capture_output=True, check=False).returncode == 0:
            return
