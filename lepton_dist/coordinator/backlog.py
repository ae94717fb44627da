"""Requests that no replica has yet, sorted coarsely by how long they will run. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import islice

from lepton_dist.coordinator.prices import Demand

_PER_OCTAVE = 8  # buckets for each doubling of the depth: 9 % apart
_NUM_BUCKETS = 40 * _PER_OCTAVE
_SHALLOWEST = 2.0 ** (-_NUM_BUCKETS / 4 / _PER_OCTAVE)


class Backlog:
    """Buckets of nearly equal depth, each in order of arrival; every operation takes constant time.

    `prompt_tokens` and `output_tokens` are those of all requests in it.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Give everything up."""
        self._buckets: dict[int, OrderedDict[str, Demand]] = {}
        self._filled = 0  # bit i: bucket i holds something
        self._demands: OrderedDict[str, tuple[Demand, int]] = OrderedDict()  # with buckets, the oldest guess first
        # What had been given out when a request came in, in order of arrival.
        self._since: OrderedDict[str, int] = OrderedDict()
        self._num_given = 0
        self.prompt_tokens = self.output_tokens = 0.0

    def __len__(self) -> int:
        return len(self._demands)

    def __contains__(self, key: str) -> bool:
        return key in self._demands

    def __getitem__(self, key: str) -> Demand:
        return self._demands[key][0]

    def add(self, key: str, demand: Demand) -> None:
        """Put a request in."""
        self._since[key] = self._num_given
        self._put(key, demand)

    def change(self, key: str, demand: Demand) -> None:
        """Another prediction for a request; it keeps its place in the order of arrival.

        Raises:
            KeyError: it is not there.
        """
        self._drop(key)
        self._put(key, demand)

    def give(self, key: str) -> Demand:
        """Take a request out for a replica.

        Raises:
            KeyError: it is not there.
        """
        del self._since[key]
        self._num_given += 1
        return self._drop(key)

    @property
    def first(self) -> str | None:
        """The request that came in first."""
        return next(iter(self._since), None)

    @property
    def longest_wait(self) -> int:
        """How many were given out since the first came in; 0 without any."""
        return self._num_given - next(iter(self._since.values()), self._num_given)

    def keys(self, count: int | None = None) -> list[str]:
        """The keys of the `count` oldest predictions, or of all."""
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

    def _put(self, key: str, demand: Demand) -> None:
        bucket = _bucket(demand.depth)
        place = self._buckets.get(bucket)
        if place is None:
            place = self._buckets[bucket] = OrderedDict()
        place[key] = demand
        self._filled |= 1 << bucket
        self._demands[key] = demand, bucket
        self.prompt_tokens += demand.prompt_tokens
        self.output_tokens += demand.output_tokens

    def _drop(self, key: str) -> Demand:
        demand, bucket = self._demands.pop(key)
        place = self._buckets[bucket]
        del place[key]
        if not place:
            self._filled &= ~(1 << bucket)
        # Sums of floats come back to nought only when they are set to it.
        self.prompt_tokens = self.prompt_tokens - demand.prompt_tokens if self._demands else 0.0
        self.output_tokens = self.output_tokens - demand.output_tokens if self._demands else 0.0
        return demand


def _bucket(depth: float) -> int:
    if depth <= _SHALLOWEST:
        return 0
    bucket = int(math.log2(depth) * _PER_OCTAVE) + _NUM_BUCKETS // 4
    return bucket if bucket < _NUM_BUCKETS else _NUM_BUCKETS - 1
