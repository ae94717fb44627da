"""Rows in: every dialect, and one bad row for every bad line."""

from __future__ import annotations

import gzip
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_dist.errors import RequestError, UsageError
from lepton_dist.text.dataset import load_dataset
from lepton_dist.text.dialects import count_rows, open_input, read_rows
from lepton_dist.text.rows import BadRow, PromptRow

CHAT = [{"role": "user", "content": "hi"}]


def read(data: bytes, *, is_text: bool = False) -> list[PromptRow | BadRow]:
    return list(read_rows(io.BytesIO(data), is_text=is_text))


def one(row: Any) -> PromptRow | BadRow:
    (result,) = read(json.dumps(row).encode())
    return result


def batch(body: dict[str, Any], url: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | fields


def test_native_rows_in_their_three_forms() -> None:
    row = one({"id": "a", "prompt": "x", "max_tokens": 3, "temperature": 0, "stop": "\n", "seed": None, "user": "me"})
    assert isinstance(row, PromptRow)
    assert (row.key, row.id, row.line, row.dialect, row.prompt) == ("s:a", "a", 1, "native", "x")
    assert row.overrides == {"max_tokens": 3, "temperature": 0.0, "stop": ("\n",)}
    row = one({"id": 7, "prompt_token_ids": [1, 2]})
    assert isinstance(row, PromptRow)
    assert (row.key, row.id, row.prompt_token_ids, row.prompt) == ("i:7", 7, [1, 2], None)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = one(
        {"messages": [*CHAT, {"role": "user", "content": parts}], "max_completion_tokens": 4, "tools": [{"a": 1}]}
    )
    assert isinstance(row, PromptRow)
    assert (row.key, row.id) == ("line:1", 1)
    assert row.messages == [*CHAT, {"role": "user", "content": parts}]
    assert row.overrides == {"max_tokens": 4}
    assert row.tools == [{"a": 1}]


def test_a_hint_of_the_output_is_no_sampling_field() -> None:
    for row in (one({"prompt": "x", "hint": 40}), one(batch({"prompt": "x", "hint": 40}))):
        assert isinstance(row, PromptRow) and row.hint == 40 and row.overrides == {}
    row = one({"prompt": "x", "hint": None})
    assert isinstance(row, PromptRow) and row.hint is None


def test_openai_batch_rows() -> None:
    row = one(batch({"model": "m", "prompt": "x", "stream": False, "logprobs": 2, "echo": False, "n": 2}))
    assert isinstance(row, PromptRow)
    assert (row.key, row.id, row.dialect, row.prompt, row.model) == ("s:a", "a", "openai_completions", "x", "m")
    assert row.overrides == {"logprobs": 2, "n": 2}
    row = one(batch({"prompt": [[5, 6]]}))
    assert isinstance(row, PromptRow)
    assert row.prompt_token_ids == [5, 6]
    row = one(batch({"messages": CHAT, "logprobs": True, "top_logprobs": 3, "top_k": 4}, "/v1/chat/completions"))
    assert isinstance(row, PromptRow)
    assert (row.dialect, row.messages) == ("openai_chat", CHAT)
    assert row.overrides == {"logprobs": 3, "top_k": 4}
    row = one(batch({"messages": CHAT, "logprobs": 0}, "/v1/chat/completions"))
    assert isinstance(row, PromptRow) and row.overrides == {}
    row = one(batch({"messages": CHAT, "logprobs": False}, "/v1/chat/completions"))
    assert isinstance(row, PromptRow)
    assert row.overrides == {}
    for url, identity in {"/v1/embeddings": "s:a", "": "s:a"}.items():
        row = one(batch({"prompt": "x"}, url))
        assert isinstance(row, BadRow)
        assert (row.key, "url must be one of" in row.message) == (identity, True)


NEUTRAL: list[dict[str, Any]] = [
    {"logprobs": False, "top_logprobs": 0},
    {"logprobs": None, "top_logprobs": None},
    {"prompt_logprobs": False},
    {"extra_body": {}, "timeout": 60, "frequency_penalty": None},
    {"skip_special_tokens": True, "spaces_between_special_tokens": False},
    {"min_tokens": 0, "length_penalty": 1, "use_beam_search": False, "include_stop_str_in_output": False},
    {"guided_json": None, "guided_choice": [], "structured_outputs": {}, "response_format": {"type": "text"}},
    {"functions": None, "reasoning_effort": None, "stream_options": None, "anything at all": None},
    {"stream_options": {"include_usage": True}, "stream": False},
    {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}, "documents": []},
    {"priority": 0, "logit_bias": {}, "bad_words": [], "allowed_token_ids": None, "cache_prompt": True},
]


@pytest.mark.parametrize("fields", NEUTRAL)
def test_fields_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    rows = [
        {"prompt": "x"} | fields,
        {"messages": CHAT, "tools": None, "add_special_tokens": False} | fields,
        batch({"prompt": "x", "add_special_tokens": True} | fields, metadata=None, method=None),
        batch({"messages": CHAT, "tools": []} | fields, "/v1/chat/completions"),
    ]
    for row in map(one, rows):
        assert isinstance(row, PromptRow), row
        assert row.overrides == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 1},
        {"min_tokens": False},
        {"skip_special_tokens": False},
        {"guided_json": {"type": "object"}},
        {"use_beam_search": True},
        {"length_penalty": 0.5},
        {"chat_template_kwargs": {"a": 1}},
        {"functions": [{}]},
        {"add_generation_prompt": False},
        {"response_format": {"type": "json_object"}},
        {"reasoning_effort": "high"},
        {"truncate_prompt_tokens": 5},
        {"add_special_tokens": True},
    ],
)
def test_fields_that_ask_for_what_is_not_done_are_refused_by_name(fields: dict[str, Any]) -> None:
    row = one(batch({"messages": CHAT} | fields, "/v1/chat/completions"))
    assert isinstance(row, BadRow)
    assert next(iter(fields)) in row.message and "leave the field out" in row.message


def test_messages_as_clients_send_them() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "tool", "tool_call_id": "c", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, "yes"]},
    ]
    row = one({"messages": [*CHAT, *said]})
    assert isinstance(row, PromptRow) and row.messages == [*CHAT, *said]
    for message in (
        {"role": "user", "content": None},
        {"role": "assistant", "content": "x", "tool_calls": {}},
        {"role": "assistant", "content": "x", "tool_calls": [5]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": {}, "text": "x"}]},
        {"role": "user", "content": 5},
    ):
        row = one({"messages": [message]})
        assert isinstance(row, BadRow) and "messages[0]." in row.message, message


SECRET = "s3cret"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"id": "a", "prompt": ""}, "prompt is empty"),
        ({"id": "a"}, "no prompt"),
        ({"id": "a", "prompt": None}, "no prompt"),
        ({"id": "a", "prompt": SECRET, "messages": CHAT}, "both prompt and messages"),
        ({"id": "a", "prompt": [SECRET]}, "prompt is a list"),
        ({"id": "a", "prompt": SECRET + "\ud800"}, "lone surrogate"),
        ({"id": "a", "prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"id": "a", "prompt_token_ids": [1, -2]}, r"prompt_token_ids[1] is -2"),
        ({"id": "a", "prompt_token_ids": [True]}, r"prompt_token_ids[0] is true"),
        ({"id": "a", "prompt_token_ids": SECRET}, "prompt_token_ids is a string"),
        ({"id": "a", "messages": []}, "messages is empty"),
        ({"id": "a", "messages": [SECRET]}, "messages[0] is a string"),
        ({"id": "a", "messages": [{"content": SECRET}]}, "messages[0].role"),
        ({"id": "a", "messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"id": "a", "prompt": SECRET, "temprature": 1}, "unknown field 'temprature'"),
        ({"id": "a", "prompt": SECRET, "hint": 0}, "hint is 0; it must be a whole number from 1"),
        ({"id": "a", "prompt": SECRET, "hint": True}, "hint is true; it must be a whole number from 1"),
        ({"id": "a", "prompt": SECRET, "temperature": -1}, "temperature is -1"),
        ({"id": "a", "prompt": SECRET, "temperature": math.nan}, "temperature is nan"),
        ({"id": "a", "prompt": SECRET, "max_tokens": "5"}, "max_tokens is a string"),
        ({"id": "a", "prompt": SECRET, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens is given twice"),
        ({"id": "a", "prompt": SECRET, "stream": True}, "stream is true"),
        ({"id": "a", "prompt": SECRET, "stream": 0}, "stream is 0"),
        ({"id": "a", "prompt": SECRET, "logit_bias": {"5": 1}}, "logit_bias"),
        ({"id": "a", "prompt": SECRET, "model": 5}, "model is 5"),
        ({"id": "a", "prompt": SECRET, "tools": {}}, "tools is an object"),
        (batch({"prompt": [SECRET, "b"]}), "prompt holds 2 prompts"),
        (batch({"messages": CHAT}), "no prompt"),
        (batch({"prompt": SECRET, "prompt_token_ids": [1]}), "prompt_token_ids"),
        (batch({"prompt": SECRET}, method="GET"), "method must be POST"),
        (batch({"prompt": SECRET}, prompt="x"), "unknown field 'prompt'"),
        (batch({"messages": CHAT, "top_logprobs": 3}, "/v1/chat/completions"), "top_logprobs needs logprobs"),
        (batch({"messages": CHAT, "logprobs": 3}, "/v1/chat/completions"), "logprobs is 3"),
        (batch({"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "/v1/chat/completions"), "top_logprobs is 21"),
        (batch({}) | {"body": [SECRET]}, "body is a list"),
    ],
)
def test_bad_rows_name_the_field_show_their_id_and_hide_the_prompt(row: dict[str, Any], named: str) -> None:
    bad = one(row)
    assert isinstance(bad, BadRow), bad
    assert named in bad.message
    assert SECRET not in bad.message
    assert (bad.id, bad.key, bad.is_keyed_by_line, bad.kind) == ("a", "s:a", False, "invalid_request_error")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"id": "a", "prompt": "x"', "not valid JSON"),
        (b'{"id": "a", "prompt": "\xff"}', "not UTF-8"),
        (b"nonsense s3cret", "not valid JSON"),
        (b"5", "the line holds 5"),
        (b'["s3cret"]', "the line holds a list"),
        (b"[" * 100_000, "nests too deep"),
        (b'{"id": 1' + b"0" * 5000 + b"}", "huge number"),
        (b'{"id": 1.5, "prompt": "x"}', "id is 1.5"),
        (b'{"id": true, "prompt": "x"}', "id is true"),
        (b'{"id": {}, "prompt": "x"}', "id is an object"),
        (b'{"id": "", "prompt": "x"}', "id is an empty string"),
        (b'{"id": "\\ud800", "prompt": "x"}', "not valid Unicode"),
        (b'{"id": 1' + b"0" * 40 + b', "prompt": "x"}', "more than 30 digits"),
        (b'{"custom_id": 5, "url": "/v1/completions", "body": {"prompt": "x"}}', "custom_id is 5"),
        (b'{"body": {"prompt": "x"}}', "custom_id is null"),
    ],
)
def test_lines_without_a_readable_id_are_keyed_by_their_line(line: bytes, named: str) -> None:
    good, bad = read(b'{"id": "line", "prompt": "x"}\n' + line)
    assert isinstance(good, PromptRow)
    assert isinstance(bad, BadRow)
    assert named in bad.message
    assert SECRET not in bad.message
    assert (bad.id, bad.line, bad.key, bad.is_keyed_by_line) == (None, 2, "line:2", True)


def test_used_ids_are_refused_and_types_tell_ids_apart() -> None:
    rows = read(b'{"id":1,"prompt":"a"}\n{"id":"1","prompt":"b"}\n{"id":1,"prompt":"c"}\n{"id":1,"prompt":""}\n')
    assert [row.key for row in rows] == ["i:1", "s:1", "line:3", "line:4"]
    assert isinstance(rows[2], BadRow)
    assert (rows[2].id, "used by an earlier row" in rows[2].message) == (1, True)
    # A row without an id is known by its line, whatever numbers the ids beside it are.
    rows = read(b'{"id":2,"prompt":"a"}\n{"prompt":"b"}\n{"prompt":"c"}\n{"id":3,"prompt":"d"}\n')
    assert [(row.key, row.id) for row in rows] == [("i:2", 2), ("line:2", 2), ("line:3", 3), ("i:3", 3)]
    assert all(isinstance(row, PromptRow) for row in rows)
    # An id in a bad row is used up too.
    rows = read(b'{"id":"a","prompt":""}\n{"id":"a","prompt":"b"}\n')
    assert [row.key for row in rows] == ["s:a", "line:2"]


def test_byte_order_mark_blank_lines_crlf_and_a_last_line_without_newline() -> None:
    rows = read(b'\xef\xbb\xbf{"id":"a","prompt":"x"}\r\n\r\n  \n{"id":"b","prompt":"\xe2\x80\xa8y"}')
    assert [(row.id, row.line) for row in rows] == [("a", 1), ("b", 4)]
    assert isinstance(rows[1], PromptRow)
    assert rows[1].prompt == "\u2028y"
    rows = read(b"\xef\xbb\xbf one \r\n\n\xff\nlast", is_text=True)
    assert [(row.key, row.id, row.line) for row in rows] == [("i:1", 1, 1), ("i:3", 3, 3), ("i:4", 4, 4)]
    assert [row.prompt for row in rows if isinstance(row, PromptRow)] == [" one ", "last"]
    assert isinstance(rows[1], BadRow)


def test_a_very_long_line() -> None:
    text = "x" * (8 << 20)
    row = one({"id": "a", "prompt": text})
    assert isinstance(row, PromptRow)
    assert row.prompt == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b'{"id":1,"prompt":"a"}', b'{"a":', b'"']))))
def test_no_input_stops_the_reader_and_every_key_is_unique(lines: list[bytes]) -> None:
    data = b"\n".join(lines)
    rows = read(data)
    assert len({row.key for row in rows}) == len(rows)
    assert len(rows) == sum(
        bool(line.removeprefix(b"\xef\xbb\xbf" * (not n)).strip()) for n, line in enumerate(data.split(b"\n"))
    )


def test_datasets(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id":"a","prompt":"x","max_tokens":2}\n\n{"prompt":"y"}\n')
    dataset = load_dataset(path)
    assert (len(dataset), [row.prompt for row in dataset], dataset[1].id, dataset[-1].line) == (2, ["x", "y"], 3, 3)
    assert len(dataset[:1]) == 1
    assert [row.prompt for row in load_dataset(str(tmp_path / "p.jsonl"))] == ["x", "y"]
    text = tmp_path / "p.TXT"
    text.write_text("one\ntwo\n")
    assert [row.prompt for row in load_dataset(text)] == ["one", "two"]
    assert [(row.id, row.prompt) for row in load_dataset(["a", "b"])] == [(1, "a"), (2, "b")]


def test_datasets_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.jsonl: the input cannot be read: No such file"):
        load_dataset(tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match="Is a directory"):
        open_input(tmp_path)
    packed = tmp_path / "packed.jsonl"
    for start, kind in ((gzip.compress(b"{}"), "gzip"), ("{}".encode("utf-16"), "UTF-16"), (b"PAR1....", "Parquet")):
        packed.write_bytes(start)
        with pytest.raises(UsageError, match=f"packed.jsonl: the input looks like {kind}"):
            load_dataset(packed)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt":"x"}\n' + '{"prompt":""}\n' * 7)
    with pytest.raises(RequestError, match=r"p\.jsonl:2: prompt is empty.*and 2 more"):
        load_dataset(path)
    path.write_text("\n")
    with pytest.raises(RequestError, match="holds no rows"):
        load_dataset(path)
    with pytest.raises(RequestError, match="prompt 2 of the list is 5"):
        load_dataset(["x", 5])  # type: ignore[list-item]


def test_rows_are_counted_as_they_will_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "a"}\r\n\n  \nnot json\n{"id": 1, "prompt": "again"}')
    with open_input(path) as stream:
        assert count_rows(path) == len(list(read_rows(stream, is_text=False))) == 3
