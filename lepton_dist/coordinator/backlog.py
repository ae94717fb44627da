"""Requests that no replica has yet, sorted coarsely by how long they will run. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import islice

from lepton_dist.coordinator.prices import Demand

_PER_OCTAVE = 8  # buckets for each doubling of the depth: 9 % apart
_NUM_BUCKETS = 40 * _PER_OCTAVE


class Backlog:
    """Buckets of nearly equal depth, each in order of arrival; every operation takes constant time."""

    def __init__(self) -> None:
        self._buckets: dict[int, OrderedDict[str, Demand]] = {}
        self._filled = 0  # bit i: bucket i holds something
        self._demands: OrderedDict[str, Demand] = OrderedDict()
        self.prompt_tokens = self.output_tokens = 0.0

    def __len__(self) -> int:
        return len(self._demands)

    def __contains__(self, key: str) -> bool:
        return key in self._demands

    def __getitem__(self, key: str) -> Demand:
        return self._demands[key]

    def add(self, key: str, demand: Demand) -> None:
        """Put a request in."""
        bucket = _bucket(demand.depth)
        self._buckets.setdefault(bucket, OrderedDict())[key] = demand
        self._filled |= 1 << bucket
        self._demands[key] = demand
        self.prompt_tokens += demand.prompt_tokens
        self.output_tokens += demand.output_tokens

    def take(self, key: str) -> Demand:
        """Take a request out."""
        demand = self._demands.pop(key)
        bucket = _bucket(demand.depth)
        self._buckets[bucket].pop(key)
        if not self._buckets[bucket]:
            self._filled &= ~(1 << bucket)
        # Sums of floats come back to nought only when they are set to it.
        self.prompt_tokens = self.prompt_tokens - demand.prompt_tokens if self._demands else 0.0
        self.output_tokens = self.output_tokens - demand.output_tokens if self._demands else 0.0
        return demand

    def keys(self, count: int | None = None) -> list[str]:
        """The keys of the first `count` that were put in, or of all."""
        return list(islice(self._demands, count))

    def longest(self, depth: float = math.inf) -> str | None:
        """One of the deepest that are no deeper than `depth`; None when all are deeper."""
        if depth <= 0:
            return None
        if depth == math.inf:
            bucket = self._filled.bit_length() - 1
        else:  # the bucket that holds `depth` itself may hold deeper ones: it is left out
            bucket = (self._filled & ((1 << _bucket(depth)) - 1)).bit_length() - 1
        return next(iter(self._buckets[bucket])) if bucket >= 0 else None

    def shortest(self) -> str | None:
        """One of the shallowest."""
        bucket = (self._filled & -self._filled).bit_length() - 1
        return next(iter(self._buckets[bucket])) if bucket >= 0 else None


def _bucket(depth: float) -> int:
    return min(max(int(math.log2(max(depth, 1e-9)) * _PER_OCTAVE) + _NUM_BUCKETS // 4, 0), _NUM_BUCKETS - 1)
