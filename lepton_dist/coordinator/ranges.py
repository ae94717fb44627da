"""Ranks as people write them: ``0-3, 8``. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lepton_dist.values import MOST_RANKS

_RANGE = re.compile(r"\s*([0-9]+)(?:-([0-9]+))?\s*")


def format_ranks(ranks: Iterable[int]) -> str:
    """Ranks in order, neighbours as a range."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def parse_ranks(text: str) -> list[int]:
    """The ranks of a text that `format_ranks` could have written, in the order given.

    Raises:
        ValueError: it is no such text.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"must be ranks such as `0-3, 8`, not {text!r}")
        last = int(match[2] or match[1])
        if last >= MOST_RANKS:
            raise ValueError(f"rank {last} is beyond the {MOST_RANKS} ranks that a job may have")
        found += range(int(match[1]), last + 1)
    return found
