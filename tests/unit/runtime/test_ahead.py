"""Items that a thread prepares ahead of need: in order, within bounds of rows and of tokens, with its errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.request import Request
from lepton_dist.errors import CheckpointError
from lepton_dist.runtime.ahead import Ahead
from lepton_dist.runtime.requests import Item, Prepared
from lepton_dist.text.rows import BadRow, PromptRow


def rows(*lengths: int) -> list[PromptRow | BadRow]:
    return [
        PromptRow(key=str(n), id=n, line=n, prompt_token_ids=[1] * length)
        if length
        else BadRow(key=str(n), id=n, line=n, message="bad")
        for n, length in enumerate(lengths)
    ]


def prepare(row: PromptRow | BadRow) -> Item:
    if isinstance(row, BadRow):
        return row
    return Prepared(row, Request(row.key, row.prompt_token_ids or [], SamplingParams()))


def settled(ahead: Ahead, seen: list[str], prepared: Callable[[], int]) -> int:
    """How many are prepared once the thread has come to rest."""
    end = time.monotonic() + 5
    before = -1
    while before != prepared() and time.monotonic() < end:
        before = prepared()
        time.sleep(0.1)
    return before


@pytest.mark.parametrize(("most_rows", "most_tokens", "ahead_of_need"), [(3, 1000, 4), (100, 25, 3), (100, 5, 2)])
def test_it_stays_within_its_bounds_and_keeps_the_order(most_rows: int, most_tokens: int, ahead_of_need: int) -> None:
    prepared: list[str] = []

    def noted(row: PromptRow | BadRow) -> Item:
        prepared.append(row.key)
        return prepare(row)

    ahead = Ahead(rows(*[10] * 8, 0, 10), noted, most_rows=most_rows, most_tokens=most_tokens)
    # One more than fits is prepared, and waits for its place.
    assert settled(ahead, prepared, lambda: len(prepared)) == ahead_of_need
    taken = []
    end = time.monotonic() + 10
    while not ahead.is_exhausted and time.monotonic() < end:
        if (item := ahead.take()) is not None:
            taken.append(item.key if isinstance(item, BadRow) else item.row.key)
    assert taken == [str(n) for n in range(10)]
    ahead.stop()


def test_an_error_comes_behind_what_was_prepared_before_it() -> None:
    def failing(row: PromptRow | BadRow) -> Item:
        if row.key == "2":
            raise CheckpointError("no tokenizer")
        return prepare(row)

    ahead = Ahead(rows(1, 1, 1), failing)
    keys = []
    with pytest.raises(CheckpointError, match="no tokenizer"):
        for _ in range(10_000):
            if (item := ahead.take()) is not None:
                keys.append(item)
            time.sleep(0.001)
    assert len(keys) == 2 and ahead.take() is None and ahead.is_exhausted
    ahead.stop()


def test_stopping_gives_up_what_waits() -> None:
    ahead = Ahead(rows(*[1] * 100), prepare, most_rows=1)
    ahead.stop()
    assert not any(thread.name == "tokenizer" for thread in threading.enumerate())
