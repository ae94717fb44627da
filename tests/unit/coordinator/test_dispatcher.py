"""Requests on their way: what drains, what is predicted anew, and when enough is known."""

from __future__ import annotations

import pytest

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.coordinator import dispatcher as module
from lepton_dist.coordinator.dispatcher import Dispatcher
from lepton_dist.coordinator.reports import RanStep, StepReport
from lepton_dist.engine.request import Request
from lepton_dist.engine.work import StepWork


def request(key: str, *, prompt: int = 10, **fields: object) -> Request:
    return Request(key, [1] * prompt, SamplingParams(**{"max_tokens": 100, "seed": 0, **fields}))


def warmed(slots: list[int]) -> Dispatcher:
    """One whose replicas have all been measured, and are equal."""
    made = Dispatcher(slots)
    for replica in range(len(slots)):
        made.ran(replica, [], StepReport.of([RanStep(StepWork(100, 4, 4), 0.1)] * 4))
    return made


def test_every_request_is_given_and_finished_once() -> None:
    made = warmed([2, 2])
    for number in range(20):
        made.submit(request(str(number)))
    seen: list[str] = []
    while made.num_outstanding:
        given, _ = made.decide()
        assert made.decide() == ({}, []), "nothing has happened since"
        for replica, requests in given.items():
            made.ran(replica, [item.key for item in requests], StepReport.of([RanStep(StepWork(50, 2, 2), 0.1)]))
            for item in requests:
                seen.append(item.key)
                made.finished(item.key, 5)
    assert sorted(seen, key=int) == [str(number) for number in range(20)]


def test_what_is_given_back_after_a_drain_is_not_given_out_again() -> None:
    made = warmed([1])
    for number in range(9):
        made.submit(request(str(number)))
    ((_, held),) = made.decide()[0].items()
    assert made.num_outstanding == 9
    made.drain()
    assert made.num_outstanding == len(held)
    made.dropped(0, [item.key for item in held[1:]])
    assert made.decide() == ({}, [])
    made.finished(held[0].key, 3)
    assert made.num_outstanding == 0


def test_lengths_are_learned_for_requests_that_wait() -> None:
    made = warmed([1])
    for number in range(400):
        made.submit(request(str(number), prompt=10 + number % 7))
    assert made.balancer.remaining_s > 0
    before = made.balancer.backlog.output_tokens
    for _ in range(100):
        for requests in made.decide()[0].values():
            for item in requests:
                made.finished(item.key, 5)
    assert len(made.balancer.backlog) > 50
    assert made.balancer.backlog.output_tokens < 0.6 * before * len(made.balancer.backlog) / 400


def test_known_lengths_are_not_guessed() -> None:
    made = warmed([1])
    made.submit(request("a", ignore_eos=True, max_tokens=70, n=2))
    assert made.balancer.backlog["a"].output_tokens == 140


@pytest.mark.parametrize(("name", "value"), [("MOST_REQUESTS", 3), ("MOST_PROMPT_TOKENS", 30)])
def test_the_backlog_is_bounded(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    monkeypatch.setattr(module, name, value)
    made = Dispatcher([1])
    for number in range(3):
        assert made.wants_more
        made.submit(request(str(number)))
    assert not made.wants_more


def test_prices_are_learned_from_steps() -> None:
    """Two replicas, one at a quarter of the other's speed: the proportions come out, and so do the speeds."""
    made = Dispatcher([16, 16])
    for number in range(400):
        samples = 1 + number * 7 % 16
        tokens = samples + (0 if number % 3 else 100 + number % 50)
        seconds = 0.010 + 0.0005 * (tokens - samples) + 0.002 * samples
        made.ran(0, [], StepReport.of([RanStep(StepWork(tokens, samples, samples), seconds)]))
        made.ran(1, [], StepReport.of([RanStep(StepWork(tokens, samples, samples), 4 * seconds)]))
    prices = made.balancer.prices
    assert made.balancer.speed(0) / made.balancer.speed(1) == pytest.approx(4.0, rel=0.02)
    assert prices.sample_s / prices.prompt_s == pytest.approx(4.0, rel=0.3)
