"""Imports that stay: the garbage collector is not to look through what they make, now or in the middle of a step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Around what a command imports: its own modules only, and what computes (torch) after its options are read.

    `--help` and a wrong option then need not wait for it, nor `inspect` for MPI.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
