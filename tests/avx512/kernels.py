"""Have a run of the tests use compiled kernels of another place: `pytest -p tests.avx512.kernels --kernels FILE`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

NAME = "lepton_dist.kernels.cpu._native"


class Elsewhere(MetaPathFinder):
    """Finds the kernels in a file of its own."""

    def __init__(self, library: Path) -> None:
        self.library = library

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, None, origin=str(self.library)) if fullname == NAME else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    sys.meta_path.insert(0, Elsewhere(config.getoption("kernels")))
    from lepton_dist.kernels.cpu.native import VectorLevel, vector_level  # asked once a process: not before this

    if vector_level() != VectorLevel.AVX512:
        raise pytest.UsageError(f"{config.getoption('kernels')} has no kernels for AVX-512, or they do not load")
