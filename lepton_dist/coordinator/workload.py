"""A workload as lengths of requests: what the planner and the simulator ask of it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lepton_dist.engine.work import StepWork, chunk_pairs
from lepton_dist.errors import ConfigError
from lepton_dist.plan.plan import EngineLimits

_TYPICAL = 16  # requests, evenly taken by length, that stand for all of them in a price


@dataclass(frozen=True, slots=True)
class RequestLengths:
    """One request; `max_tokens` is what its sender allows, at least `output_tokens`."""

    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    arrival_s: float = 0.0


@dataclass(frozen=True)
class Workload:
    """All requests. `is_endless` when `requests` are only a sample of a stream that keeps every replica full."""

    requests: tuple[RequestLengths, ...]
    is_endless: bool = False

    @staticmethod
    def of(requests: Sequence[RequestLengths], *, is_endless: bool = False) -> Workload:
        """Of some requests.

        Raises:
            ConfigError: there are none.
        """
        if not requests:
            raise ConfigError("the workload is empty: there is nothing to plan for", key="workload")
        return Workload(tuple(requests), is_endless)

    @cached_property
    def longest_tokens(self) -> int:
        """Tokens of prompt and output that one request may need in the KV cache."""
        return max(request.prompt_tokens + request.max_tokens for request in self.requests)

    @cached_property
    def prompt_tokens(self) -> float:
        """The mean prompt."""
        return statistics.fmean(request.prompt_tokens for request in self.requests)

    @cached_property
    def output_tokens(self) -> float:
        """The mean output."""
        return statistics.fmean(request.output_tokens for request in self.requests)

    @cached_property
    def typical(self) -> tuple[RequestLengths, ...]:
        """A few requests that stand for all: evenly taken by length."""
        ordered = sorted(self.requests, key=lambda request: (request.output_tokens, request.prompt_tokens))
        count = min(_TYPICAL, len(ordered))
        return tuple(ordered[(2 * index + 1) * len(ordered) // (2 * count)] for index in range(count))

    def batch(self, limits: EngineLimits, capacity_tokens: float, num_replicas: int = 1) -> int:
        """Sequences that a replica with this KV cache steps together, in the mean; 0 if the longest does not fit."""
        if capacity_tokens < self.longest_tokens:
            return 0
        room = int(capacity_tokens / (self.prompt_tokens + self.output_tokens))
        offered = limits.max_sequences if self.is_endless else -(-len(self.requests) // num_replicas)
        return max(1, min(limits.max_sequences, room, offered))

    def mean_step(self, batch: int, num_stages: int, limits: EngineLimits) -> StepWork:
        """A step in the steady state: decoding sequences, and the prompts of those that take the finished ones' place.

        A pipeline deals its sequences out over a micro-batch for each stage.
        """
        width = -(-batch // num_stages)
        prompt, output = self.prompt_tokens, self.output_tokens
        new = min(width * prompt / output, max(limits.batch_tokens(num_stages) - width, 1))
        pairs = new * chunk_pairs(0, max(1, round(prompt))) / prompt
        return StepWork(width + round(new), width, width, round(width * (prompt + output / 2)), round(pairs))
