"""The Triton kernels without a GPU: their results under Triton's interpreter, and that they compile for GPUs.

Both run in children: the interpreter is chosen when the kernels are imported, for the whole process.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.harness import run

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")


@pytest.mark.slow
def test_the_kernels_give_the_torch_paths_results_under_the_interpreter() -> None:
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "cases_triton.py"]
    job = run(arguments, seconds=280, env={"TRITON_INTERPRET": "1"})
    assert job.returncode == 0 and " passed" in job.stdout and " skipped" not in job.stdout, job.report()


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    job = run(
        ["-m", "tests.unit.kernels.compile_triton", capability],
        seconds=250,
        env={"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
    )
    assert job.returncode == 0, job.report()
    assert job.stdout.count("compiled") == 14, job.report()
