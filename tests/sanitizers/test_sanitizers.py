"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no access out of bounds, nothing undefined."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_dist.kernels.cpu.native import native_library

COMPILER = shutil.which("gcc")


def has_sanitizers() -> bool:
    """gcc answers with a bare name where it has no such file."""
    if COMPILER is None:
        return False
    answer = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    return Path(answer.stdout.strip()).is_absolute()


@pytest.mark.slow
@pytest.mark.skipif(not has_sanitizers(), reason="no gcc with sanitizers")
@pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2")
def test_the_kernels_tests_pass_under_them() -> None:
    command = [str(Path(__file__).with_name("check"))]
    job = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert job.returncode == 0, f"{job.stdout[-4000:]}\n{job.stderr[-4000:]}"
