"""The length predictor learns an order where there is one, and steps aside where there is none."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.lengths import LengthPredictor, RequestFeatures, rank_correlation

Teacher = Callable[[RequestFeatures, random.Random], int]


def some(source: random.Random) -> RequestFeatures:
    prompt = [source.randrange(1000) for _ in range(source.randint(4, 400))]
    return RequestFeatures(prompt, max_tokens=4096, has_stop=source.random() < 0.3)


def noise(source: random.Random) -> float:
    return math.exp(source.gauss(0, 0.3))


def by_prompt_length(features: RequestFeatures, source: random.Random) -> int:
    return max(1, int(0.5 * len(features.prompt) * noise(source)))


def by_first_token(features: RequestFeatures, source: random.Random) -> int:
    return max(1, int((20 if features.prompt[0] == 7 else 400) * noise(source)))


def unrelated(features: RequestFeatures, source: random.Random) -> int:
    return max(1, int(math.exp(source.gauss(4, 1.2))))


def taught(teacher: Teacher, steps: int, make: Callable[[random.Random], RequestFeatures] = some) -> LengthPredictor:
    predictor, source = LengthPredictor(), random.Random(5)
    for _ in range(steps):
        features = make(source)
        predictor.learn(features, teacher(features, source))
    return predictor


def correlation(
    predictor: LengthPredictor, teacher: Teacher, make: Callable[[random.Random], RequestFeatures]
) -> float:
    source = random.Random(99)
    fresh = [make(source) for _ in range(300)]
    guesses = np.array([predictor.predict(features) for features in fresh])
    return rank_correlation(guesses, np.array([float(teacher(features, source)) for features in fresh]))


def test_lengths_that_follow_the_prompt() -> None:
    predictor = taught(by_prompt_length, 500)
    assert predictor.is_trusted and predictor.rank_correlation is not None and predictor.rank_correlation > 0.8
    assert correlation(predictor, by_prompt_length, some) > 0.85
    # Right in sum too, as whoever plans by these numbers adds them up.
    source = random.Random(1)
    fresh = [some(source) for _ in range(500)]
    predicted = sum(predictor.predict(features) for features in fresh)
    assert predicted == pytest.approx(sum(by_prompt_length(features, source) for features in fresh), rel=0.15)


def test_lengths_that_follow_an_instruction() -> None:
    def make(source: random.Random) -> RequestFeatures:
        return RequestFeatures([source.choice([7, 8, 9])] * 3 + [source.randrange(1000) for _ in range(40)], 4096)

    predictor = taught(by_first_token, 400, make)
    short, long = ([first] * 3 + list(range(100, 140)) for first in (7, 8))
    assert predictor.predict(RequestFeatures(short, 4096)) * 4 < predictor.predict(RequestFeatures(long, 4096))


def test_hints_are_learned_to_be_believed() -> None:
    def make(source: random.Random) -> RequestFeatures:
        return RequestFeatures(some(source).prompt, 4096, hint=int(math.exp(source.uniform(1, 7))))

    def teacher(features: RequestFeatures, source: random.Random) -> int:
        return max(1, int((features.hint or 1) * 0.5 * noise(source)))

    predictor = taught(teacher, 400, make)
    assert correlation(predictor, teacher, make) > 0.85
    assert predictor.predict(RequestFeatures([1] * 50, 4096, hint=400)) == pytest.approx(200, rel=0.5)


def test_it_steps_aside_when_nothing_can_be_told() -> None:
    predictor, source, aside = LengthPredictor(), random.Random(5), 0
    one, other = (RequestFeatures([3] * count, 4096) for count in (5, 300))
    for step in range(800):
        features = some(source)
        predictor.learn(features, unrelated(features, source))
        if not predictor.is_trusted:
            aside += 1
            assert predictor.predict(one) == predictor.predict(other), step
    assert aside >= 600, aside  # chance is let through now and then


def test_it_steps_aside_again_when_the_order_is_gone() -> None:
    predictor, source = LengthPredictor(), random.Random(5)
    for teacher in (by_prompt_length, unrelated):
        for _ in range(400):
            features = some(source)
            predictor.learn(features, teacher(features, source))
        assert predictor.is_trusted == (teacher is by_prompt_length), predictor.rank_correlation


def test_before_anything_is_known() -> None:
    predictor = LengthPredictor()
    assert predictor.predict(RequestFeatures([1, 2], 100)) == 100
    assert predictor.predict(RequestFeatures([1, 2], 100, hint=30)) == 30
    assert predictor.rank_correlation is None
    predictor.learn(RequestFeatures([1, 2], 100), 40)
    assert predictor.predict(RequestFeatures([5], 100)) == 40
    assert predictor.predict(RequestFeatures([5], 10)) == 10


def test_what_cannot_end_early_is_known() -> None:
    predictor = taught(by_prompt_length, 100)
    assert predictor.predict(RequestFeatures([1], 77, ignores_end=True)) == 77
    assert predictor.predict(RequestFeatures([1], 77, ignores_end=True, has_stop=True)) < 77


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 200000), min_size=1, max_size=30),
            st.integers(1, 10**6),
            st.booleans(),
            st.none() | st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_predictions_are_lengths(rows: list[tuple[list[int], int, bool, int | None]]) -> None:
    predictor = LengthPredictor()
    for prompt, max_tokens, has_stop, hint in rows:
        features = RequestFeatures(prompt, max_tokens, has_stop, hint=hint)
        assert 1 <= predictor.predict(features) <= max_tokens
        predictor.learn(features, max(1, max_tokens // 2))


def test_rank_correlation() -> None:
    first, second = np.array([1.0, 20, 3, 400, 5]), np.array([2.0, 1, 3, 5, 4])
    differences = [1 - 2, 4 - 1, 2 - 3, 5 - 5, 3 - 4]  # of the ranks
    assert rank_correlation(first, second) == pytest.approx(1 - 6 * sum(d * d for d in differences) / (5 * 24))
    assert rank_correlation(first, -first) == pytest.approx(-1)
    assert rank_correlation(first, np.ones(5)) == 0
    # Ties share their mean rank: 0.5, 0.5, 2 against 0, 1, 2.
    assert rank_correlation(np.array([4.0, 4, 9]), np.array([1.0, 2, 3])) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


def test_it_takes_little_time() -> None:
    predictor = taught(by_prompt_length, 300)
    features = RequestFeatures(list(range(200)), 4096)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(50):
            predictor.predict(features)
            predictor.learn(features, 30)
        best = min(best, (time.perf_counter() - start) / 50)
    assert best < 1e-3


def hinted(source: random.Random) -> RequestFeatures:
    """A hint that says all there is to say; the prompts are alike."""
    return RequestFeatures([1] * 20, max_tokens=4096, hint=round(math.exp(source.uniform(2, 7))))


def test_a_hint_is_taken_until_lengths_are_judged_and_learned_from_then_on() -> None:
    def half(features: RequestFeatures, source: random.Random) -> int:
        return max(1, round(0.5 * (features.hint or 0) * noise(source)))

    assert taught(half, 4, hinted).predict(hinted(random.Random(1))) == hinted(random.Random(1)).hint
    learned = taught(half, 600, hinted)
    assert correlation(learned, half, hinted) > 0.9
    asked = RequestFeatures([1] * 20, max_tokens=4096, hint=400)
    assert learned.predict(asked) == pytest.approx(200, rel=0.4)
    # Hints that mean nothing are found out.
    wrong = taught(lambda features, source: unrelated(features, source), 300, hinted)
    assert not wrong.is_trusted
    assert wrong.predict(asked) == wrong.predict(RequestFeatures([1] * 20, max_tokens=4096, hint=4))


def test_once_much_was_learned_a_part_of_the_requests_is_enough() -> None:
    predictor, source = LengthPredictor(), random.Random(5)
    learned = [predictor.learn(features, by_prompt_length(features, source)) for features in [some(source)] * 3000]
    assert all(learned[:1000])
    assert 0.2 < sum(learned[1100:]) / len(learned[1100:]) < 0.3
