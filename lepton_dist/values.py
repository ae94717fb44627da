"""The one door for settings that come from options, run files and scripts alike: each is checked here, the same way.

Floor 0, beside `documents`. Every check raises a `ValueError` whose text names the setting, its value and what it may
be; who knows the file and the line adds them.
"""

from __future__ import annotations

import math
from typing import Any

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by the dtypes that a model may be in."""

FLOATS = tuple(FLOAT_BYTES)
MOST_THREADS = 1024
MOST_RANKS = 1 << 20
MOST_SECONDS = 1e8  # three years; clocks and timers take no infinity


def checked_dtype(value: Any) -> str:
    """A dtype for weights, KV cache and wire alike.

    Raises:
        ValueError: it is none. Kinds of rounded weights are none: they would round KV cache and wire too.
    """
    if isinstance(value, str) and value in FLOATS:
        return value
    raise ValueError(
        f"dtype is {_shown(value)}; it must be one of {', '.join(FLOATS)} (kinds of weights such as int8 and int4 are "
        "written in the plan: `precision: {weights: int8}`)"
    )


def checked_whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number.

    Raises:
        ValueError: it is none, or out of range.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"{name} is {_shown(value)}; it must be a whole number from {least} to {most}")


def checked_threads(value: Any) -> int:
    """Threads of a rank; 0 is what the job or the cores say.

    Raises:
        ValueError: as `checked_whole`.
    """
    return checked_whole("threads", value, 0, MOST_THREADS)


def checked_seconds(name: str, value: Any, *, is_zero_allowed: bool) -> float:
    """A time in seconds.

    Raises:
        ValueError: it is no number, negative, or more than some years.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value <= MOST_SECONDS and (is_zero_allowed or value):
        return float(value)
    allowed = "0 or more" if is_zero_allowed else "above 0"
    raise ValueError(f"{name} is {_shown(value)}; it must be a number of seconds, {allowed}, at most {MOST_SECONDS:g}")


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    # Python refuses to print integers of more than some thousand digits.
    is_huge = isinstance(value, int) and abs(value) >= 10**30
    return "a number of more than 30 digits" if is_huge else repr(value)[:60]
