"""The engine without a model: what ends a sequence, how samples become one output, and what may be given back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch, make_batch, read_admitted, read_int32, read_spans
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Request
from lepton_dist.engine.request import Sequence as EngineSequence
from lepton_dist.engine.runner import StepResult
from lepton_dist.engine.scheduler import Chunk
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.text.completion import RequestOutput, TokenLogprob

END = 9


class Scanner:
    """Stops when the tokens of the stop string, one a character, have all been seen in order at the end."""

    def __init__(self, stops: Sequence[str], _preceding: Sequence[int]) -> None:
        self.found: str | None = None
        self.cut = 0
        self._stops, self._text = stops, ""

    def push(self, token_id: int) -> bool:
        self._text += str(token_id)
        self.found = next((stop for stop in self._stops if self._text.endswith(stop)), None)
        self.cut = len(self._text) - len(self.found or "")
        return self.found is not None


def engine(*, num_blocks: int = 32, num_stages: int = 1, ahead: int = 0, **limits: Any) -> Engine:
    wanted = {"block_tokens": 4, "max_batch_tokens": 32, "max_sequences": 8, **limits}
    return Engine(EngineLimits(**wanted), num_blocks, num_stages, (END,), Scanner, ahead=ahead)


def request(key: str, *, length: int = 3, **fields: Any) -> Request:
    return Request(key, list(range(length)), SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **fields}))


def answer(batch: RunBatch, tokens: Sequence[int]) -> StepResult:
    """A result with these tokens, and a log-probability wherever one was asked for."""
    asked = read_int32(batch.samples.counts, 3)[:, 1]
    logprobs = {row: [TokenLogprob(-1.0, 1, tokens[row])] for row in np.flatnonzero(asked >= 0).tolist()}
    scored = [[TokenLogprob(-2.0, 1, int(token))] for token in read_int32(batch.prompt_rows, 3)[:, 1]]
    return StepResult(batch.step, np.array(tokens, dtype=np.int32).tobytes(), logprobs, scored)


def drive(made: Engine, token: int = 5) -> dict[str, RequestOutput]:
    """Run to the end; every step samples `token`."""
    outputs: dict[str, RequestOutput] = {}
    while made.has_work:
        batch = made.next_batch()
        assert batch is not None
        outputs.update(made.apply(answer(batch, [token] * (len(batch.samples.rows) // 4))))
    return outputs


def test_a_text_ends_for_one_reason_and_the_model_s_own_end_goes_first() -> None:
    cases: dict[str, tuple[dict[str, Any], int, str, str | int | None, int]] = {
        "length": ({}, 5, "length", None, 4),
        "end": ({}, END, "stop", None, 1),
        "end as a stop token": ({"stop_token_ids": (END,)}, END, "stop", None, 1),
        "ignored end": ({"ignore_eos": True}, END, "length", None, 4),
        "ignored end as a stop token": ({"ignore_eos": True, "stop_token_ids": (END,)}, END, "stop", END, 1),
        "stop token": ({"stop_token_ids": (4, 5)}, 5, "stop", 5, 1),
        "stop string": ({"stop": ("no", "55")}, 5, "stop", "55", 2),
        "stop string at the last token": ({"stop": ("5555",)}, 5, "stop", "5555", 4),
    }
    for name, (fields, token, reason, stop, count) in cases.items():
        made = engine()
        made.add(request(name, **fields))
        completion = drive(made, token)[name].completions[0]
        assert (completion.finish_reason, completion.stop_reason) == (reason, stop), name
        assert completion.token_ids == [token] * count, name


def test_samples_come_back_together_each_with_its_own_scanner_and_noise() -> None:
    made = engine()
    made.add(request("many", n=3, stop=("55",), temperature=1.0, seed=1, logprobs=0))
    batch = made.next_batch()
    assert batch is not None
    keys = read_int32(batch.samples.keys, 2).tolist()
    assert len({tuple(key) for key in keys}) == 3
    assert not made.apply(answer(batch, [5, 4, 5]))
    batch = made.next_batch()
    assert batch is not None
    assert not made.apply(answer(batch, [5, 5, 4]))  # only the first has its stop string
    output = drive(made)["many"]
    assert [completion.token_ids for completion in output.completions] == [[5, 5], [4, 5, 5], [5, 4, 5, 5]]
    assert [completion.cut for completion in output.completions] == [0, 1, 2]
    assert [len(completion.logprobs or []) for completion in output.completions] == [2, 3, 4]
    assert output.usage() == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


def test_prompt_logprobs_are_one_entry_a_token_after_the_first() -> None:
    made = engine(max_batch_tokens=4)
    made.add(request("scored", length=11, n=2, prompt_logprobs=0))
    made.add(request("one token", length=1, prompt_logprobs=0))
    made.add(request("not", length=5))
    outputs = drive(made)
    entries = outputs["scored"].prompt_logprobs
    assert entries is not None and entries[0] is None
    assert [entry[0].token_id for entry in entries[1:] if entry] == list(range(1, 11))
    assert outputs["one token"].prompt_logprobs == [None]
    assert outputs["not"].prompt_logprobs is None


def test_only_what_no_sample_has_begun_is_given_back() -> None:
    made = engine(max_sequences=3)
    for key in ("first", "second", "third"):
        made.add(request(key, n=2))
    batch = made.next_batch()  # both samples of the first, one of the second
    assert batch is not None and read_spans(batch).shape[0] == 3
    assert made.drop_waiting() == ["third"]
    made.apply(answer(batch, [5, 5, 5]))
    assert set(drive(made)) == {"first", "second"}


def test_a_batch_as_it_travels() -> None:
    """Flat arrays: spans, block tables behind one another, rows to sample, and the history of a slot that begins."""
    first = EngineSequence(request("a", length=6, logprobs=3, temperature=0.5, seed=1, top_k=-1), 0, 0)
    first.block_table.extend([4, 2])
    second = EngineSequence(request("b", length=3, presence_penalty=0.5, prompt_logprobs=2), 0, 1, is_long=True)
    second.tokens.append(7)
    second.block_table.append(9)
    second.slot = 5
    batch = make_batch(8, [Chunk(first, 4, 2, True, False), Chunk(second, 1, 3, True, True)], [second])
    assert (batch.step, batch.num_tokens) == (8, 5)
    assert read_int32(batch.tokens).tolist() == [4, 5, 1, 2, 7]
    assert read_spans(batch).tolist() == [[0, 2, 6, 2, 0], [2, 3, 4, 1, 1]]
    assert read_int32(batch.block_tables).tolist() == [4, 2, 9]
    assert read_int32(batch.samples.rows).tolist() == [1, 4]
    assert read_int32(batch.samples.counts, 3).tolist() == [[0, 3, -1], [0, -1, 5]]
    assert np.frombuffer(batch.samples.settings, dtype=np.float32).reshape(2, 6).tolist() == [
        [0.5, 1, 0, 1, 0, 0],
        [0, 1, 0, 1, 0.5, 0],
    ]
    (admitted,) = read_admitted(batch.samples)
    assert (admitted.slot, admitted.prompt.tolist(), admitted.output.tolist()) == (5, [0, 1, 2], [7])
    # Of the prompt 0, 1, 2 only position 1 is scored in this chunk, by the token 2 behind it.
    assert read_int32(batch.prompt_rows, 3).tolist() == [[2, 2, 2]]


def test_a_step_that_runs_ahead_names_the_rows_of_the_one_before() -> None:
    made = engine(ahead=1)
    for key in "ab":
        made.add(request(key, temperature=1.0, seed=1))
    first, second = made.next_batch(), made.next_batch()
    assert first is not None and second is not None and not made.has_room
    assert read_int32(second.tokens).tolist() == [-1, -2]
    assert read_spans(second)[:, :3].tolist() == [[0, 1, 4], [1, 1, 4]]
    assert [key for key, _ in made.apply(answer(first, [5, END]))] == ["b"]
    third = made.next_batch()
    assert third is not None
    assert read_int32(third.tokens).tolist() == [-1]  # b has ended; a is row 0 of the second step
    assert [key for key, _ in made.apply(answer(second, [4, 4]))] == []
    assert [key for key, _ in made.apply(answer(third, [END]))] == ["a"]
    assert not made.has_work and made.num_in_flight == 0


def test_the_noise_of_a_step_is_the_same_whether_it_ran_ahead() -> None:
    def keys(ahead: int) -> list[list[int]]:
        made = engine(ahead=ahead)
        made.add(request("a", temperature=1.0, seed=1))
        found, waiting = [], []
        while made.has_work:
            batch = made.next_batch() if made.has_room else None
            if batch is None:
                made.apply(answer(waiting.pop(0), [5]))
            else:
                waiting.append(batch)
                found.append(read_int32(batch.samples.keys).tolist())
        return found

    assert keys(0) == keys(1) and len(keys(1)) == 4


def test_a_history_is_sent_once_and_its_slot_is_used_again() -> None:
    """What was drawn is known where it was drawn, so steps with penalties run ahead too; preemption changes nothing."""
    made = engine(ahead=1, num_blocks=9, max_sequences=4)
    for key in ("one", "two"):
        made.add(request(key, length=6, presence_penalty=0.5, max_tokens=12, n=1 + (key == "two")))
    made.add(request("plain", length=3, max_tokens=3))
    sent: list[tuple[int, int, int]] = []
    slots: dict[int, list[int]] = {}
    waiting: list[RunBatch] = []
    while made.has_work:
        batch = made.next_batch() if made.has_room else None
        if batch is None:
            done = waiting.pop(0)
            made.apply(answer(done, [5] * (len(done.samples.rows) // 4)))
            continue
        waiting.append(batch)
        sent += [(item.slot, len(item.prompt), len(item.output)) for item in read_admitted(batch.samples)]
        slots[batch.step] = read_int32(batch.samples.counts, 3)[:, 2].tolist()
    assert made.scheduler.num_preemptions > 0 and len(waiting) == 0
    assert sent == [(0, 6, 0), (1, 6, 0), (2, 6, 0)]
    made.add(request("later", presence_penalty=0.5))
    batch = made.next_batch()
    assert batch is not None and read_int32(batch.samples.counts, 3)[0, 2] == 0


def test_a_command_of_64_long_histories_is_small() -> None:
    made = engine(num_blocks=64 * 140, block_tokens=16, max_batch_tokens=64 * 2048, max_sequences=64)
    for index in range(64):
        made.add(request(str(index), length=2048, repetition_penalty=1.1, frequency_penalty=0.1, max_tokens=9))
    first = made.next_batch()
    assert first is not None and len(list(read_admitted(first.samples))) == 64
    made.apply(answer(first, [5] * 64))
    batch = made.next_batch()
    assert batch is not None and not batch.samples.admitted
    assert len(msgspec.msgpack.encode(batch)) < 64 * 1024


def test_a_sequence_without_numbers_begins_again_by_itself_before_it_fails() -> None:
    """What it offered is withdrawn, for it may have spoilt it; who had taken that over comes through in the end."""
    made = engine(max_sequences=2, prefix_cache=True)
    made.add(request("bad", length=10))
    made.add(request("good", length=10))
    first = made.next_batch()  # both begin with the same two blocks, which the second takes over in the same step
    assert first is not None and read_spans(first)[:, 1].tolist() == [10, 2]
    assert not made.apply(answer(first, [-1, -1]))
    again = made.next_batch()
    assert again is not None and read_spans(again)[:, 1].tolist() == [10, 10], "nothing is taken over"
    assert not set(read_int32(again.block_tables)[:3].tolist()) & set(read_int32(again.block_tables)[3:].tolist())
    # The one that begins again last goes first.
    (key, output), *more = made.apply(answer(again, [5, -1]))
    assert key == "bad" and not more and not output.completions
    assert "not numbers" in output.failure and "after the prompt" in output.failure
    assert drive(made)["good"].completions[0].token_ids == [5] * 4
    assert made.scheduler.blocks.num_free == 32


def test_a_request_fails_with_all_its_samples_running_or_waiting() -> None:
    made = engine(max_sequences=3)
    made.add(request("many", n=4, temperature=1.0, seed=1))
    batch = made.next_batch()
    assert batch is not None and not made.apply(answer(batch, [5, 5, 5]))
    batch = made.next_batch()
    assert batch is not None and not made.apply(answer(batch, [5, -1, 5]))
    batch = made.next_batch()
    assert batch is not None
    rows = len(batch.samples.rows) // 4
    tokens = read_spans(batch)[:, 1].tolist()
    (key, output), *more = made.apply(answer(batch, [-1 if count > 1 else 5 for count in tokens][:rows]))
    assert (key, more) == ("many", []) and "after 1 token(s) of output" in output.failure
    assert not made.has_work and made.scheduler.blocks.num_free == 32


def test_a_prompt_with_a_position_that_cannot_be_scored_fails() -> None:
    made = engine(max_batch_tokens=4)
    made.add(request("scored", length=7, prompt_logprobs=0))
    outputs: dict[str, RequestOutput] = {}
    while made.has_work:
        batch = made.next_batch()
        assert batch is not None
        result = answer(batch, [5] * (len(batch.samples.rows) // 4))
        if read_spans(batch)[0, 2] == 4:  # the first chunk, whose last token is no sample
            result.prompt_logprobs[1] = []
        outputs.update(made.apply(result))
    assert "not numbers" in outputs["scored"].failure


def test_what_runs_ahead_of_a_failure_counts_for_nothing() -> None:
    made = engine(ahead=1)
    made.add(request("bad", temperature=1.0, seed=1))
    first, second = made.next_batch(), made.next_batch()
    assert first is not None and second is not None
    assert not made.apply(answer(first, [-1]))
    third = made.next_batch()
    assert third is not None and read_spans(third)[:, 1].tolist() == [3]
    assert not made.apply(answer(second, [-1]))
    assert not made.apply(answer(third, [5]))
    assert drive(made)["bad"].completions[0].token_ids == [5] * 4
