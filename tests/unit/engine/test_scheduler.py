"""Decisions of the scheduler that have a reason of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.kv_blocks import KvBlocks
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.scheduler import Chunk, Scheduler


def make(num_blocks: int, *, batch: int = 16, sequences: int = 8, stages: int = 1, reuse: bool = False) -> Scheduler:
    blocks = KvBlocks(num_blocks, 4, has_prefix_cache=reuse)
    return Scheduler(blocks, max_batch_tokens=batch, max_sequences=sequences, num_stages=stages)


def sequence(arrival: int, length: int) -> Sequence:
    prompt = [arrival * 100 + index for index in range(length)]
    return Sequence(Request(str(arrival), prompt, SamplingParams(max_tokens=40)), 0, arrival)


def come_back(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    scheduler.returned(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.sequence.tokens.append(7)


def counts(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.arrival, chunk.start, chunk.count) for chunk in chunks]


def test_decodes_go_before_the_rest_of_a_long_prompt() -> None:
    scheduler = make(32, batch=8)
    scheduler.add(sequence(0, 20))
    scheduler.add(sequence(1, 3))
    assert counts(scheduler.schedule()) == [(0, 0, 8)]
    assert counts(scheduler.schedule()) == [(0, 8, 8)]
    chunks = scheduler.schedule()
    assert counts(chunks) == [(0, 16, 4), (1, 0, 3)]
    come_back(scheduler, chunks)
    assert counts(scheduler.schedule()) == [(0, 20, 1), (1, 3, 1)]


def test_the_youngest_gives_way_and_the_oldest_never_does() -> None:
    scheduler = make(4)
    for arrival in range(2):
        scheduler.add(sequence(arrival, 6))
    while scheduler.num_preemptions == 0:
        chunks = scheduler.schedule()
        assert chunks and chunks[0].sequence.arrival == 0
        come_back(scheduler, chunks)
    assert [chunk.sequence.arrival for chunk in chunks] == [0]
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)


def test_stages_share_the_running_sequences() -> None:
    """With three stages no batch takes more than a third of the decodes, so the other stages have work too."""
    scheduler = make(64, stages=3, sequences=6, batch=64)
    for arrival in range(6):
        scheduler.add(sequence(arrival, 12))
    batches = [scheduler.schedule() for _ in range(3)]
    assert sorted(index for batch in batches for index, _, _ in counts(batch)) == list(range(6))
    assert not scheduler.schedule()
    for batch in batches:
        come_back(scheduler, batch)
    assert [len(scheduler.schedule()) for _ in range(3)] == [2, 2, 2]


def test_a_sequence_that_gives_way_itself_leaves_its_place_to_another() -> None:
    """Two stages, so one of two sequences runs a step: the decode comes first but finds no block, the prefill runs."""
    scheduler = make(3, batch=4, stages=2)
    old, young = sequence(0, 10), sequence(1, 4)
    scheduler.add(young)
    come_back(scheduler, scheduler.schedule())
    scheduler.add(old)
    scheduler._running.append(scheduler._waiting.popleft())  # an older one whose prompt is still being read
    scheduler._running.sort(key=lambda item: item.arrival)
    old.is_running = True
    scheduler.num_running += 1
    scheduler.blocks.extend(old, 8)
    old.num_computed = 4
    assert scheduler.blocks.num_free == 0
    assert counts(scheduler.schedule()) == [(0, 4, 4)]
    assert scheduler.num_preemptions == 1


def test_reused_tokens_are_counted_once_a_start() -> None:
    """A sequence that is tried again and again while there is no room has reused nothing yet."""
    scheduler = make(8, reuse=True, batch=64, sequences=3)
    first = sequence(0, 12)
    again = Sequence(Request("again", list(first.request.prompt) + [1] * 18, SamplingParams(max_tokens=2)), 0, 1)
    scheduler.add(first)
    scheduler.add(again)
    chunks = scheduler.schedule()
    assert counts(chunks) == [(0, 0, 12)]
    for _ in range(5):
        come_back(scheduler, chunks)
        chunks = scheduler.schedule()
    assert scheduler.num_waiting == 1 and scheduler.num_reused_tokens == 0
    scheduler.returned(chunks)
    scheduler.finish(first)
    assert counts(scheduler.schedule()) == [(1, 12, 18)]
    assert scheduler.num_reused_tokens == 12


def counting(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of these was called."""
    calls: dict[str, int] = {}
    of = [(KvBlocks, "extend"), (KvBlocks, "publish"), (KvBlocks, "_extend_keys"), (Scheduler, "_is_idle")]

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*arguments)

        return call

    for owner, name in of:
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return calls


def test_a_step_of_a_thousand_decodes_touches_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some sequences need a block more, and some have filled one; of all others only the place is noted."""
    scheduler = make(4096, batch=8192, sequences=1024, reuse=True)
    for arrival in range(1024):
        scheduler.add(sequence(arrival, 5 + arrival % 4))
    come_back(scheduler, scheduler.schedule())
    calls = counting(scheduler, monkeypatch)
    for _ in range(8):
        chunks = scheduler.schedule()
        assert len(chunks) == 1024
        come_back(scheduler, chunks)
    # Each sequence takes two blocks of 4 tokens in 8 steps, and is looked at when it has filled one.
    assert calls["extend"] == 2048 and calls["_extend_keys"] == 2048 and "_is_idle" not in calls
    assert calls["publish"] <= 2 * 2048


def test_each_victim_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When blocks are short for all, the search goes over the running sequences once a step, not once for each."""
    scheduler = make(512, batch=8192, sequences=512)
    for arrival in range(512):
        scheduler.add(sequence(arrival, 3))
    calls = counting(scheduler, monkeypatch)
    while not scheduler.num_preemptions:
        calls.clear()
        come_back(scheduler, scheduler.schedule())
    assert scheduler.num_preemptions > 50
    assert calls["_is_idle"] <= 512


def test_full_blocks_are_offered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(64, reuse=True)
    scheduler.add(sequence(0, 9))
    offered: list[int] = []
    calls = counting(scheduler, monkeypatch)
    for _ in range(20):
        come_back(scheduler, scheduler.schedule())
        offered.append(len(scheduler.blocks._block_of))
    assert offered == [(9 + step) // 4 for step in range(20)]
    assert calls["_extend_keys"] == 1 + offered[-1] - offered[0] + 1  # reuse looks for a prefix first
