"""Handing requests to replicas: never beyond credit, always to the least load, and every request accounted for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lepton_dist.coordinator.balancer import Balancer


@given(
    credit=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 100), st.integers(0, 10**6)), max_size=60),
    is_dynamic=st.booleans(),
)
def test_credit_and_load(credit: list[int], steps: list[tuple[bool, int, int]], is_dynamic: bool) -> None:
    balancer = Balancer(credit, is_dynamic=is_dynamic)
    held: list[dict[str, int]] = [{} for _ in credit]
    for number, (is_arrival, tokens, pick) in enumerate(steps):
        outstanding = [(replica, key) for replica, load in enumerate(held) for key in load]
        if is_arrival:
            replica = balancer.assign(str(number), tokens)
            free = [index for index, load in enumerate(held) if len(load) < credit[index]]
            if replica is None:
                assert not free or not is_dynamic
                continue
            assert replica in free
            if is_dynamic:
                loads = {index: sum(held[index].values()) for index in free}
                assert loads[replica] == min(loads.values())
            held[replica][str(number)] = tokens
        elif outstanding:
            replica, key = outstanding[pick % len(outstanding)]
            balancer.finished(key)
            del held[replica][key]
        assert balancer.num_outstanding == sum(map(len, held))
        assert balancer.has_credit or not is_dynamic or all(len(h) == c for h, c in zip(held, credit, strict=True))


def test_in_turn() -> None:
    """Without dynamic scheduling each replica takes its turn, also when all of them have nothing to do."""
    balancer = Balancer([2, 2, 2], is_dynamic=False)
    chosen = []
    for number in range(6):
        chosen.append(balancer.assign(str(number), 5))
        balancer.finished(str(number))
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_a_key_that_is_not_known_is_an_error() -> None:
    with pytest.raises(KeyError):
        Balancer([1]).finished("unknown")
