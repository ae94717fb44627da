"""Requests on their way to replicas and back: what the balancer hears, with prices and predicted lengths. Pure.

The controller and the simulator both drive this; neither decides anything itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lepton_dist.coordinator.balancer import Balancer
from lepton_dist.coordinator.decisions import LoggedBalancer, Write
from lepton_dist.coordinator.lengths import LengthPredictor, RequestFeatures
from lepton_dist.coordinator.prices import Demand, PriceLearner, Prices, Steps
from lepton_dist.coordinator.reports import StepReport
from lepton_dist.engine.request import Request
from lepton_dist.plan.plan import BalancerPolicy

# How far ahead the balancer looks: it needs the longest requests early and short ones left for the end.
MOST_REQUESTS = 16384
MOST_PROMPT_TOKENS = 2**21
_GUESS_AGAIN = 2  # requests of the backlog whose lengths are predicted anew whenever one has taught something


class Dispatcher:
    """Keeps every request that is not finished, and says where each is to go.

    Args:
        slots: sequences that run at once, one number a replica.
        capacities: tokens of KV cache, one number a replica; as many as any request needs by default.
        policy: as in `Balancer`.
        write: takes the lines of the balancer's log, if one is wanted (see `decisions.py`).
    """

    def __init__(
        self,
        slots: Sequence[int],
        policy: BalancerPolicy = "predicted",
        *,
        capacities: Sequence[int] | None = None,
        prices: Prices | None = None,
        write: Write | None = None,
    ) -> None:
        self._learner = PriceLearner(prices)
        make = Balancer if write is None else _logged(write)
        self.balancer = make(slots, policy=policy, capacities=capacities, prices=self._learner.prices)
        self.lengths = LengthPredictor()
        self._requests: dict[str, tuple[Request, RequestFeatures]] = {}
        self._num_reports, self._num_replicas = 0, len(slots)
        self._is_draining = False
        self._has_news = True  # since the last decisions

    @property
    def num_outstanding(self) -> int:
        """Requests submitted and not finished."""
        return len(self._requests)

    @property
    def wants_more(self) -> bool:
        """Whether the balancer would look at more requests."""
        balancer = self.balancer
        return balancer.num_waiting < MOST_REQUESTS and balancer.waiting_prompt_tokens < MOST_PROMPT_TOKENS

    def submit(self, request: Request) -> None:
        """A request has come in; its key must not be in use."""
        sampling = request.sampling
        has_stop = bool(sampling.stop or sampling.stop_token_ids)
        features = RequestFeatures(request.prompt, sampling.max_tokens, has_stop, sampling.ignore_eos, request.hint)
        self._has_news = True
        self.balancer.add(request.key, self._demand(request, features))  # refuses a key that is in use
        self._requests[request.key] = request, features

    def expect_more(self, is_so: bool) -> None:
        """Whether more requests will come, beyond those submitted."""
        if is_so != self.balancer.expects_more:
            self._has_news = True
            self.balancer.expect_more(is_so)

    def decide(self) -> tuple[dict[int, list[Request]], list[tuple[int, list[str]]]]:
        """What each replica gets now, and the keys of what it is to give back if it has not begun it."""
        given: dict[int, list[Request]] = {}
        if not self._has_news:
            return given, []
        self._has_news = False
        for key, replica in self.balancer.assign():
            given.setdefault(replica, []).append(self._requests[key][0])
        return given, self.balancer.take_back()

    def ran(self, replica: int, begun: Sequence[str], report: StepReport) -> None:
        """A replica has begun these requests, and run these steps."""
        self._has_news = True
        for key in begun:
            self.balancer.started(key)
        if not report.num_steps:
            return
        # About: who samples has one token that is not of its prompt.
        prompt_tokens = max(report.work.tokens - report.work.samples, 0)
        together = Steps(report.num_steps, prompt_tokens, report.work.samples, report.seconds)
        self.balancer.measured(replica, together)
        self._learner.observe(together, self.balancer.speed(replica))
        self._num_reports += 1
        # Once a round: every replica's load is summed up anew for other prices.
        if self._num_reports % self._num_replicas == 0 and _differ(self._learner.prices, self.balancer.prices):
            self.balancer.set_prices(self._learner.prices)

    def finished(self, key: str, output_tokens: int | None) -> None:
        """A request is done, with so many tokens over all of its samples; None where it has failed."""
        self._has_news = True
        request, features = self._requests.pop(key)
        self.balancer.finished(key, output_tokens)
        if output_tokens and self.lengths.learn(features, max(1, round(output_tokens / request.sampling.n))):
            self._guess_again()

    def dropped(self, replica: int, keys: Sequence[str]) -> None:
        """A replica has given back these requests, and no others that it was asked for."""
        self._has_news = True
        if self._is_draining:
            for key in keys:
                self.balancer.finished(key)
                del self._requests[key]
        else:
            self.balancer.returned(replica, keys)

    def abandon(self) -> None:
        """Every request is gone, wherever it was."""
        self._has_news = True
        for key in self.balancer.drop_backlog():
            del self._requests[key]
        for key in self._requests:
            self.balancer.finished(key)
        self._requests.clear()

    def drain(self) -> None:
        """Give up what no replica has; what replicas give back from now on is given up too."""
        self._is_draining = True
        for key in self.balancer.drop_backlog():
            del self._requests[key]

    def _demand(self, request: Request, features: RequestFeatures) -> Demand:
        samples = request.sampling.n
        most_tokens = len(request.prompt) + request.sampling.max_tokens
        return Demand(len(request.prompt), samples * self.lengths.predict(features), samples, most_tokens)

    def _guess_again(self) -> None:
        """Predict some lengths of the backlog anew, the oldest guesses first."""
        for key in self.balancer.backlog.keys(_GUESS_AGAIN):
            self.balancer.guess(key, self._demand(*self._requests[key]))


def _logged(write: Write) -> Callable[..., Balancer]:
    def make(slots: Sequence[int], **settings: Any) -> Balancer:
        return LoggedBalancer(write, slots, **settings)

    return make


def _differ(new: Prices, old: Prices) -> bool:
    """Whether a price has moved by more than a twentieth: to sum up every load anew for less is not worth it."""
    pairs = ((new.step_s, old.step_s), (new.prompt_s, old.prompt_s), (new.sample_s, old.sample_s))
    return any(abs(after - before) > 0.05 * before for after, before in pairs)
