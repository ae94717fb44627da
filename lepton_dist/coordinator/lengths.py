"""How long an output will be: learned while requests finish, and not used while it is no better than chance. Pure.

Ridge regression on the logarithm of the length with exponential forgetting. Only the order of requests and their sum
matter to those who ask, so predictions are scaled to the lengths that were seen, and judged by rank correlation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WINDOW = 256  # finished requests over which predictions are judged
_FEWEST = 32  # finished requests before they are judged at all
# One-sided 5 % of the rank correlation of unrelated values, times sqrt(n - 1).
_CHANCE = 1.645
_FORGETTING = 0.998
_RIDGE = 1.0
_SOLVE_EVERY = 8
_LEARN_ALL, _LEARN_EVERY = 4 * WINDOW, 4  # so many finished requests teach, and of those after them every fourth
# Instructions stand at the beginning or at the end of a prompt: their tokens are hashed into a few buckets each.
_HEAD_TOKENS, _TAIL_TOKENS, _BUCKETS = 8, 16, 16
_NUMBERS = 6
_MULTIPLIER = 2654435761  # Knuth's multiplicative hash

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RequestFeatures:
    """What is known of a request before it runs. `hint` is the length that its sender expects, if any."""

    prompt: Sequence[int]
    max_tokens: int
    has_stop: bool = False
    ignores_end: bool = False
    hint: int | None = None

    @property
    def known_tokens(self) -> int | None:
        """The length where nothing can end the output early; None elsewhere."""
        return self.max_tokens if self.ignores_end and not self.has_stop else None


class LengthPredictor:
    """Predicts output tokens of requests; `learn` from each that has finished."""

    def __init__(self) -> None:
        size = _NUMBERS + 2 * _BUCKETS
        self._information = np.zeros((size, size))
        self._evidence = np.zeros(size)
        self._weights: Floats = np.zeros(size)
        self._num_learned = self._num_seen = 0
        self._mean_log = 0.0
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # regression's guess, actual
        self._lengths: deque[int] = deque(maxlen=WINDOW)
        self._correlation: float | None = None
        self._scale = 1.0

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of what the regression guessed and what came, over the window; None before it is judged."""
        return self._correlation

    @property
    def is_trusted(self) -> bool:
        """Whether the regression orders requests better than chance."""
        return self._correlation is not None and self._correlation > _CHANCE / math.sqrt(len(self._seen) - 1)

    def predict(self, features: RequestFeatures) -> float:
        """Tokens, at least 1 and at most `max_tokens`.

        Before the regression is judged: the sender's hint. Without trust in it, or a hint: the mean of the lengths
        seen, and before any, `max_tokens`.
        """
        if features.known_tokens is not None:
            return float(features.known_tokens)
        if self.is_trusted:
            guess = self._scale * self._regress(_encode(features))
        elif features.hint is not None and self._correlation is None:
            guess = float(features.hint)
        elif self._lengths:
            guess = sum(self._lengths) / len(self._lengths)
        else:
            guess = float(features.max_tokens)
        return min(max(guess, 1.0), float(features.max_tokens))

    def learn(self, features: RequestFeatures, actual: int) -> bool:
        """A request has finished after `actual` tokens, at least 1; returns whether it was learned from.

        What was known beforehand teaches nothing. When many have been learned from, one in four is enough.
        """
        if features.known_tokens is not None:
            return False
        self._num_seen += 1
        if self._num_learned >= _LEARN_ALL and self._num_seen % _LEARN_EVERY:
            return False
        row = _encode(features)
        if self._num_learned:
            self._seen.append((min(self._regress(row), float(features.max_tokens)), float(actual)))
        self._lengths.append(actual)
        target = math.log(actual)
        self._num_learned += 1
        self._mean_log += (target - self._mean_log) / min(self._num_learned, WINDOW)
        self._information = _FORGETTING * self._information + np.outer(row, row)
        self._evidence = _FORGETTING * self._evidence + row * (target - self._mean_log)
        if self._num_learned % _SOLVE_EVERY == 0:
            self._settle()
        return True

    def _regress(self, row: Floats) -> float:
        return math.exp(min(self._mean_log + float(row @ self._weights), 30.0))

    def _settle(self) -> None:
        """Solve for the weights, and judge what was guessed so far."""
        ridge = _RIDGE * np.eye(len(self._evidence))
        self._weights = np.asarray(np.linalg.solve(self._information + ridge, self._evidence), dtype=np.float64)
        if len(self._seen) < _FEWEST:
            return
        guesses, actuals = (np.array(values, dtype=np.float64) for values in zip(*self._seen, strict=True))
        self._correlation = rank_correlation(guesses, actuals)
        self._scale = float(actuals.sum() / guesses.sum())


def rank_correlation(first: Floats, second: Floats) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 where one side is constant."""
    a, b = (_ranks(values) - (len(values) - 1) / 2 for values in (first, second))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle: Floats = (np.cumsum(counts) - (counts + 1) / 2).astype(np.float64)
    return middle[place]


def _encode(features: RequestFeatures) -> Floats:
    """Numbers around 0 and 1: the lengths' logarithms, then how often tokens fall into each bucket."""
    row = np.zeros(_NUMBERS + 2 * _BUCKETS)
    has_hint = features.hint is not None and features.hint > 0
    row[:_NUMBERS] = (
        1.0,
        math.log1p(len(features.prompt)) / 8 - 0.5,
        math.log(max(features.max_tokens, 1)) / 8 - 0.5,
        features.has_stop,
        has_hint,
        math.log(features.hint) / 8 if has_hint and features.hint else 0.0,
    )
    _count(row[_NUMBERS : _NUMBERS + _BUCKETS], features.prompt[:_HEAD_TOKENS])
    _count(row[_NUMBERS + _BUCKETS :], features.prompt[-_TAIL_TOKENS:])
    return row


def _count(buckets: Floats, tokens: Sequence[int]) -> None:
    for token in tokens:
        buckets[(token * _MULTIPLIER >> 16) % _BUCKETS] += 1.0 / math.sqrt(len(tokens))
