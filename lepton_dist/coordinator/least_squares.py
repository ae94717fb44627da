"""Recursive least squares with exponential forgetting: a few dimensionless factors, learned one observation at a time.

In the information form (Ljung, System Identification: Theory for the User, 2nd edition, section 11.2), with what is
believed beforehand never forgotten: so a factor that nothing tells of returns to 1, and no covariance winds up.
"""

from __future__ import annotations

import numpy as np

LOWEST, HIGHEST = 0.05, 50.0
# An observation counts as this many times the prediction at most: a step that something else held up says little.
_LARGEST_SURPRISE = 2.0


class FactorLearner:
    """Factors f that bring sum(f_k x_k) near y, from the start at 1 on.

    Errors count in proportion to sum(x_k). A factor strays from 1 by `spread` (standard deviation) before anything is
    seen, `noise` is the relative error that remains, and an observation n steps old weighs ``forgetting ** n``.
    """

    def __init__(self, num_factors: int, *, spread: float = 0.5, noise: float = 0.05, forgetting: float = 0.98) -> None:
        self._factors = np.ones(num_factors)
        self._prior = np.eye(num_factors) * (noise / spread) ** 2
        self._information = np.zeros((num_factors, num_factors))
        self._evidence = np.zeros(num_factors)
        self._forgetting = forgetting

    @property
    def factors(self) -> tuple[float, ...]:
        """What was learned; each between 0.05 and 50."""
        return tuple(self._factors.tolist())

    def learn(self, x: tuple[float, ...], y: float) -> None:
        """Take in one observation; y is above 0. Where all of x is 0 it says nothing."""
        scale = sum(x)
        if scale <= 0:
            return
        row = np.asarray(x) / scale
        seen = min(y / scale, _LARGEST_SURPRISE * float(row @ self._factors))
        self._information = self._forgetting * self._information + np.outer(row, row)
        self._evidence = self._forgetting * self._evidence + row * (seen - 1.0)
        change = np.linalg.solve(self._information + self._prior, self._evidence)
        self._factors = np.clip(1.0 + change, LOWEST, HIGHEST)
