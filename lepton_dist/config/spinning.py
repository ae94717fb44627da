"""How long torch's OpenMP threads spin between two pieces of work: set before OpenMP is loaded, with torch."""

from __future__ import annotations

import os

_TURNS = "10000"
"""Of GNU's OpenMP: under a millisecond. Its own 300,000 keep a core busy for tens of milliseconds after each loop, and
keep off it what else has work: the very thread, it may be, that the others wait for."""
_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def bound_spinning() -> None:
    """Have OpenMP's threads sleep soon where they wait, unless the user says how they wait.

    Without effect where torch was imported before.
    """
    if not any(name in os.environ for name in _BY_THE_USER):
        os.environ["GOMP_SPINCOUNT"] = _TURNS
