"""One finding of `doctor`, and how a list of them is shown."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["OK", "WARN", "FAIL"]

_WIDTH = 118
_COLUMN = 6


@dataclass(frozen=True)
class Check:
    """What was found about a topic. `advice` says what to do about it; empty where there is nothing to do."""

    topic: str
    verdict: Verdict
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def table(checks: Sequence[Check]) -> str:
    """The checks for people: verdict, topic and finding, the advice below it behind an arrow."""
    width = max((len(check.topic) for check in checks), default=0)
    lines = []
    for check in checks:
        head = f"{check.verdict:{_COLUMN}}{check.topic:{width}}  "
        indent = " " * len(head)
        lines += _wrapped(head, indent, check.found)
        if check.advice:
            lines += _wrapped(f"{indent}-> ", f"{indent}   ", check.advice)
    return "\n".join(lines)


def _wrapped(first: str, later: str, text: str) -> list[str]:
    # Paths and numbers stay whole, however long: they are there to be copied.
    lines = []
    for part in text.split("\n"):
        lines += textwrap.wrap(
            part, _WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
        )
        first = later
    return lines


def size(num_bytes: float) -> str:
    """Bytes in the unit that reads best: ``1.5 GiB``."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def numbers(values: Sequence[int]) -> str:
    """Sorted whole numbers as ranges: ``0-3, 8``."""
    parts: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], value)
        else:
            parts.append((value, value))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
