"""What a step and a request cost on each replica of a plan: predicted from the profile, corrected by what is measured.

Pure: no clock. The equations and their sources are in docs/decisions/006-cost-model.md.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.least_squares import FactorLearner
from lepton_dist.coordinator.likeness import Likeness, kind_numbers
from lepton_dist.coordinator.stage_cost import TERMS, ModelCost, StageCost, Terms
from lepton_dist.engine.work import StepWork, chunk_pairs
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.placement import Seat, seats
from lepton_dist.plan.plan import Plan, Replica
from lepton_dist.plan.precision import Dtypes

WINDOW = 256  # steps over which errors are kept
_SETTLE_EVERY = 8  # steps between two looks at which prediction is the better; the prior's, before the first


class ReplicaCost:
    """The stages of one replica; a message between rank 0 and its leader takes `reach_s`."""

    def __init__(self, stages: Sequence[StageCost], command_s: float, reach_s: float = 0.0) -> None:
        self.stages = tuple(stages)
        self.reach_s = reach_s
        self._command_s = command_s

    def interval(self, work: StepWork, in_flight: int | None = None) -> Terms:
        """Terms of the time from one result to the next with `in_flight` batches on their way (default: one a stage).

        That is the slowest stage's, or with fewer batches than stages, a batch's whole way shared among them.
        """
        if len(self.stages) == 1:
            return self._with_command(self.stages[0].terms(work))
        terms = [stage.terms(work) for stage in self.stages]
        slowest = max(terms, key=_total)
        if in_flight is None or in_flight >= len(self.stages):
            return slowest
        way = self._with_command(_sum(terms))
        shared = Terms(*(value / in_flight for value in way))
        return max(slowest, shared, key=_total)

    def step_s(self, work: StepWork, in_flight: int | None = None) -> float:
        """Seconds of `interval`."""
        return self.interval(work, in_flight).total

    def latency(self, work: StepWork) -> Terms:
        """Terms of one batch's whole way through an idle replica."""
        return self._with_command(_sum([stage.terms(work) for stage in self.stages]))

    def latency_s(self, work: StepWork) -> float:
        """Seconds of `latency`."""
        return self.latency(work).total

    def rank_shares(self, work: StepWork) -> list[tuple[float, ...]]:
        """By stage, the part of the steady interval in which each rank computes; the rest of it, it waits."""
        interval_s = self.step_s(work)
        return [tuple(seconds / interval_s for seconds in stage.rank_seconds(work)) for stage in self.stages]

    def _with_command(self, terms: Terms) -> Terms:
        return terms._replace(transfers=terms.transfers + self._command_s) if self._command_s else terms


def _total(terms: Terms) -> float:
    return terms.total


def _sum(terms: list[Terms]) -> Terms:
    total = terms[0]
    for more in terms[1:]:
        total = total.plus(more)
    return total


@dataclass(frozen=True)
class Errors:
    """Relative errors |predicted - measured| / measured over the last steps: prior, and with what was learned.

    `uses_prior` says that the model has fallen back to its prior, which was the better one (or nothing is judged yet).
    """

    num_steps: int
    prior_median: float
    prior_p95: float
    learned_median: float
    learned_p95: float
    uses_prior: bool


@dataclass(frozen=True)
class TermRow:
    """A term in the mean of the observed steps: the prior's seconds, its learned factor, its share of both together."""

    term: str
    prior_s: float
    factor: float
    share: float


class _Learned:
    """What one replica's steps have taught."""

    def __init__(self) -> None:
        self.learner = FactorLearner(len(TERMS))
        self.factors = self.learner.factors
        self.errors: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self.priors: deque[Terms] = deque(maxlen=WINDOW)
        self.num_steps = 0
        self.is_better = False

    def corrected(self, terms: Terms) -> Terms:
        return Terms(*(factor * value for factor, value in zip(self.factors, terms, strict=True)))

    def observe(self, prior: Terms, seconds: float) -> None:
        # The errors are those of predictions made before the step was seen.
        mistakes = [abs(guess - seconds) / seconds for guess in (prior.total, self.corrected(prior).total)]
        self.errors.append((mistakes[0], mistakes[1]))
        self.priors.append(prior)
        self.learner.learn(prior, seconds)
        self.factors = self.learner.factors
        self.num_steps += 1
        if self.num_steps % _SETTLE_EVERY == 0:
            before, after = zip(*self.errors, strict=True)
            self.is_better = statistics.median(after) < statistics.median(before)


class CostModel:
    """One `ReplicaCost` for each replica of a resolved plan, and what its measured steps have taught.

    `is_gated` and `is_tied` are the model's, as in `ModelConfig`.
    """

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        shape: ModelShape,
        dtypes: Dtypes,
        *,
        is_gated: bool = True,
        is_tied: bool = False,
    ) -> None:
        self._limits = plan.engine
        model = ModelCost(shape, dtypes, is_gated, is_tied)
        placed = seats(plan, shape)
        self.replicas = _replica_costs(plan, model, placed, cluster)
        self._learned = [_Learned() for _ in self.replicas]

    def predict(self, replica: int, work: StepWork, in_flight: int | None = None) -> float:
        """Seconds from one result to the next; by the prior alone while that is nearer to what was measured."""
        return self.predict_terms(replica, work, in_flight).total

    def predict_terms(self, replica: int, work: StepWork, in_flight: int | None = None) -> Terms:
        """The terms of `predict`."""
        prior, learned = self.replicas[replica].interval(work, in_flight), self._learned[replica]
        return learned.corrected(prior) if learned.is_better else prior

    def observe(self, replica: int, work: StepWork, seconds: float, in_flight: int | None = None) -> None:
        """Learn from a step that took `seconds`, above 0, from the result before it (or its start, if later)."""
        self._learned[replica].observe(self.replicas[replica].interval(work, in_flight), seconds)

    def errors(self, replica: int) -> Errors | None:
        """How far the predictions of the last steps were off; None before the first step."""
        seen = self._learned[replica].errors
        if not seen:
            return None
        prior, learned = (sorted(values) for values in zip(*seen, strict=True))
        high, uses_prior = min(len(seen) - 1, int(0.95 * len(seen))), not self._learned[replica].is_better
        middle = statistics.median(prior), statistics.median(learned)
        return Errors(len(seen), middle[0], prior[high], middle[1], learned[high], uses_prior)

    def table(self, replica: int) -> list[TermRow]:
        """The terms in the mean of the last observed steps; empty before the first."""
        learned = self._learned[replica]
        if not learned.priors:
            return []
        count = len(learned.priors)
        means = [sum(values) / count for values in zip(*learned.priors, strict=True)]
        corrected = [factor * mean for factor, mean in zip(learned.factors, means, strict=True)]
        total = sum(corrected) or 1.0
        return [
            TermRow(term, mean, factor, value / total)
            for term, mean, factor, value in zip(TERMS, means, learned.factors, corrected, strict=True)
        ]

    def request_s(self, replica: int, prompt_tokens: int, output_tokens: float, batch: int) -> float:
        """Seconds of the replica's time that a request takes when `batch` sequences share its steps.

        The prompt costs what its chunks add to steps that decode the others anyway; each token of the output after
        the first, which comes with the prompt, costs its share of a decoding step.
        """
        context = prompt_tokens + int(output_tokens) // 2
        stages = len(self.replicas[replica].stages)
        in_flight = min(stages, batch)
        # The sequences of a pipeline are dealt out over its micro-batches.
        width = -(-batch // in_flight)
        decoding = StepWork(width, width, width, width * context)
        step_s = self.predict(replica, decoding, in_flight)
        return self._prompt_s(replica, prompt_tokens, width, context, in_flight) + max(
            output_tokens - 1, 0
        ) * step_s / (width * in_flight)

    def _prompt_s(self, replica: int, prompt_tokens: int, width: int, context: int, in_flight: int) -> float:
        """What the chunks of a prompt add to steps that decode the other sequences."""
        others = width - 1
        beside = StepWork(others, others, others, others * context)
        beside_s = self.predict(replica, beside, in_flight) if others else 0.0
        room = max(self._limits.batch_tokens(len(self.replicas[replica].stages)) - others, 1)
        total = 0.0
        for start in range(0, prompt_tokens, room):
            count = min(room, prompt_tokens - start)
            is_last = start + count == prompt_tokens
            both = StepWork(
                others + count, others + is_last, others + 1, beside.decode_kv_tokens, chunk_pairs(start, count)
            )
            total += self.predict(replica, both, in_flight) - beside_s
        return total


def _replica_costs(plan: Plan, model: ModelCost, placed: Mapping[int, Seat], cluster: Cluster) -> list[ReplicaCost]:
    """By replica. Those that are alike share their stages, and what those remember."""
    alike = Likeness(cluster, kind_numbers(cluster)) if len(plan.replicas) > 1 else None
    known: dict[object, tuple[Sequence[StageCost], float]] = {}
    costs = []
    for replica in plan.replicas:
        key = replica if alike is None else alike.of(replica)
        if key not in known:
            known[key] = _stage_costs(replica, model, placed, cluster), _command_s(replica, cluster)
        costs.append(ReplicaCost(*known[key], cluster.link(0, replica.leader).latency_s))
    return costs


def _stage_costs(
    replica: Replica, model: ModelCost, placed: Mapping[int, Seat], cluster: Cluster
) -> Sequence[StageCost]:
    stages = []
    before: tuple[int, ...] = ()
    for stage in replica.stages:
        own = [placed[rank] for rank in stage.ranks]
        stages.append(StageCost(model, own, cluster, before))
        before = stage.ranks
    return stages


def _command_s(replica: Replica, cluster: Cluster) -> float:
    """The command of a step goes to every rank, and the result of the last stage back to the leader."""
    first, last = replica.stages[0].ranks, replica.stages[-1].ranks
    down = max(cluster.link(replica.leader, rank).latency_s for rank in first)
    return down + cluster.link(last[0], replica.leader).latency_s
