"""The kernels for AVX-512 and AMX, on any machine with AVX2: tests/avx512/instructions.h computes their instructions.

The tests are those that a machine with AVX-512 runs with its own, here in a run of theirs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lepton_dist.kernels.cpu.native import native_library
from tests.harness import run

ROOT = Path(__file__).parents[3]
COMPILER = shutil.which("gcc") or shutil.which("clang")
# -ffast-math lets a compiler sum in an order that differs from one number of rows to the next, as no instruction does.
FLAGS = ["-O1", "-fPIC", "-fopenmp", "-Wno-psabi", "-ffp-contract=off"]
PRODUCTS = [
    "tests/unit/kernels/test_matmul.py",
    "tests/unit/kernels/test_not_numbers.py",
    "tests/unit/kernels/test_paged_attention.py",
    "tests/unit/model/test_native_layer.py",
]
TESTS = [
    *PRODUCTS,
    "tests/unit/kernels/test_pointwise.py",
    "tests/unit/parallel/test_load.py",
    "tests/unit/runtime/test_head_start.py",
    "tests/unit/storage/test_row_loading.py",
]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
    pytest.mark.skipif(native_library() is None, reason="no compiled kernels: not built, or no AVX2"),
]


def compile_kernels(folder: Path, *flags: str) -> Path:
    """The library with its instructions for AVX-512 emulated, from what the package is built of."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = settings["tool"]["setuptools"]["ext-modules"][0]["sources"]
    header = f'-DEMULATED_512="{ROOT / "tests/avx512/instructions.h"}"'
    assert COMPILER is not None

    def compile_one(source: str) -> Path:
        to = folder / Path(source).with_suffix(".o").name
        subprocess.run([COMPILER, *FLAGS, *flags, header, "-c", source, "-o", to], cwd=ROOT, check=True)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "kernels.so"
    subprocess.run([COMPILER, *FLAGS, "-shared", *objects, "-lm", "-o", library], check=True)
    return library


@pytest.mark.parametrize(
    ("flags", "tests"),
    [pytest.param([], TESTS, id="avx512"), pytest.param(["-DEMULATED_TILES"], PRODUCTS, id="amx")],
)
def test_kernels_pass_the_tests_of_all(flags: list[str], tests: list[str], tmp_path: Path) -> None:
    library = compile_kernels(tmp_path, *flags)
    job = run(["-m", "pytest", "-q", "-p", "tests.avx512.kernels", "--kernels", library, *tests], seconds=600)
    assert job.returncode == 0, job.report()
    assert "AVX512" not in job.stdout  # none was left out for want of it
