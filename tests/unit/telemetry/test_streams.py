"""Streams that fail: what is shown goes missing, and nothing else."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_dist.telemetry.streams import QuietStream

CHILD = """
import os, sys
from lepton_dist.telemetry.streams import Show, secure_standard_streams
from lepton_dist.telemetry.voice import notice, report
secure_standard_streams()
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
show = Show()
faults = [show("caf\\u00e9" * 3000) for _ in range(40)]
notice("told")
report(ValueError("failed"))
os.write(out, repr([out > 2, show.is_lost, [fault for fault in faults if fault]]).encode())
"""


@pytest.mark.parametrize(
    ("shell", "lost", "faults"),
    [
        ('"$@"', False, []),
        ('"$@" >&-', False, []),
        ('"$@" 2>&-', False, []),
        ('"$@" >&- 2>&- <&-', False, []),
        ('PYTHONIOENCODING=ascii "$@"', False, []),
        ('"$@" >/dev/full', True, ["No space left on device"]),
        ('"$@" 2>/dev/full', False, []),
        ('"$@" | head -c 1; exit ${PIPESTATUS[0]}', True, []),
        ('"$@" 2>&1 | head -c 1; exit ${PIPESTATUS[0]}', True, []),
    ],
)
def test_a_process_goes_on_to_its_end(shell: str, lost: bool, faults: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "out")]
    done = subprocess.run(["bash", "-c", shell, "bash", *command], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done
    assert (tmp_path / "out").read_text() == repr([True, lost, faults]), done


def test_a_quiet_stream_is_quiet_for_good() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    broken = io.TextIOWrapper(io.FileIO(write_end, "w"), write_through=True)
    stream = QuietStream(broken)
    assert stream.write("x") == 1 and stream.write("yz") == 2
    stream.flush()
    assert not stream.isatty() and stream.fileno() == write_end
    broken.detach().close()
