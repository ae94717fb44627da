"""Switches the compiled kernels off, as on a machine where they were not built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

MODULES = ("cpu.layer", "cpu.paged", "cpu.panels", "cpu.pointwise")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within it every kernel takes its torch path."""
    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch(f"lepton_dist.kernels.{module}.native_library", lambda: None))
        yield
