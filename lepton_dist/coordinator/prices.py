"""What work costs on the reference replica: a small linear price list, corrected while the job runs. Pure.

The reference is a replica of speed 1; `speed.py` says how many reference seconds each replica does in a second. Only
proportions matter to the balancer, so the prices that it starts with may be those of another machine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request will probably ask for. `output_tokens` counts all of its samples.

    `most_tokens` are what one of its samples may take of a KV cache: it runs only where there are as many.
    """

    prompt_tokens: float
    output_tokens: float
    num_samples: int = 1
    most_tokens: int = 0

    @property
    def depth(self) -> float:
        """Steps that it takes from its start to its end, about: its samples run side by side, its prompt in chunks."""
        return self.output_tokens / self.num_samples + self.prompt_tokens / _CHUNK_TOKENS


_CHUNK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps that a replica has run: how many, tokens of prompts in them, tokens drawn, and the seconds they took."""

    num_steps: int
    prompt_tokens: float
    samples: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class Prices:
    """Reference seconds of a step, of each token of a prompt in it, and of each token drawn in it.

    The defaults are in proportion what CPUs ask for a model that does not fit their caches: a step reads the weights
    once, for the price of some twenty prompt tokens.
    """

    step_s: float = 20.0
    prompt_s: float = 1.0
    sample_s: float = 1.0

    def steps(self, steps: Steps) -> float:
        """Seconds that the reference replica would have needed."""
        return steps.num_steps * self.step_s + steps.prompt_tokens * self.prompt_s + steps.samples * self.sample_s

    def share(self, slots: int) -> float:
        """Seconds of the replica that a drawn token takes when `slots` sequences share each step."""
        return self.step_s / slots + self.sample_s

    def work(self, demand: Demand, slots: int) -> float:
        """Seconds of the replica that a request takes when `slots` sequences share each step."""
        return demand.prompt_tokens * self.prompt_s + demand.output_tokens * (self.step_s / slots + self.sample_s)


class PriceLearner:
    """Fits the price list to measured steps by recursive least squares with forgetting, in relative errors.

    What it sees is the seconds times the replica's speed, so the unit stays and only proportions are learned. Of
    batches that are all alike nothing can be told apart; the list then stays near what it was.
    """

    _FORGETTING = 0.99
    _CERTAINTY = 4.0  # observations that the first list is worth

    def __init__(self, prices: Prices | None = None) -> None:
        self.prices = prices or Prices()
        self._scale = (self.prices.step_s, self.prices.prompt_s, self.prices.sample_s)
        self._factors = [1.0, 1.0, 1.0]
        self._covariance = [[1.0 / self._CERTAINTY if i == j else 0.0 for j in range(3)] for i in range(3)]

    def observe(self, steps: Steps, speed: float) -> None:
        """Learn from steps of a replica of this speed."""
        expected = self.prices.steps(steps)
        if expected <= 0 or steps.busy_s <= 0:
            return
        counts = (steps.num_steps, steps.prompt_tokens, steps.samples)
        x = [count * scale / expected for count, scale in zip(counts, self._scale, strict=True)]
        gain = [sum(row[j] * x[j] for j in range(3)) for row in self._covariance]
        spread = self._FORGETTING + sum(a * b for a, b in zip(x, gain, strict=True))
        # One step that waited for something else must not turn the list over.
        seen = min(max(steps.busy_s * speed / expected, 0.25), 4.0)
        error = seen - sum(a * b for a, b in zip(x, self._factors, strict=True))
        for i in range(3):
            self._factors[i] = min(max(self._factors[i] + gain[i] / spread * error, 0.01), 100.0)
            for j in range(3):
                self._covariance[i][j] = (self._covariance[i][j] - gain[i] * gain[j] / spread) / self._FORGETTING
            # What is never seen is not forgotten without bound.
            self._covariance[i][i] = min(self._covariance[i][i], 1.0)
        self.prices = Prices(*(scale * factor for scale, factor in zip(self._scale, self._factors, strict=True)))
