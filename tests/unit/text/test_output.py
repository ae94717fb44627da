"""Rows out: their exact shapes in each dialect, and the way back from a row to its input."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.text.completion import Completion, RequestOutput, TokenLogprob
from lepton_dist.text.dialects import read_rows
from lepton_dist.text.output import OutputFormatter, key_of_output
from lepton_dist.text.rows import BadRow, PromptRow
from lepton_dist.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer(all_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return all_tokenizers["byte_level"]


def only_row(fields: dict[str, Any]) -> PromptRow | BadRow:
    (row,) = read_rows([json.dumps(fields).encode()], is_text=False)
    return row


def good_row(fields: dict[str, Any]) -> PromptRow:
    row = only_row(fields)
    assert isinstance(row, PromptRow)
    return row


def completion(tokenizer: Tokenizer, text: str = "again", index: int = 0, **fields: Any) -> Completion:
    return Completion(index=index, token_ids=tokenizer.encode(text), finish_reason="length", **fields)


def written(line: bytes) -> dict[str, Any]:
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    result: dict[str, Any] = json.loads(line)
    return result


def test_a_native_row(tokenizer: Tokenizer) -> None:
    formatter, row = OutputFormatter(tokenizer, model="m"), good_row({"id": 7, "prompt": "x"})
    done = completion(tokenizer, "again\n")
    count = len(done.token_ids)
    result = written(formatter.finished(row, SamplingParams(), RequestOutput(prompt_tokens=3, completions=[done])))
    usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
    assert result == {"id": 7, "text": "again\n", "finish_reason": "length", "usage": usage}


def test_stop_token_is_in_the_ids_and_not_in_the_text(tokenizer: Tokenizer) -> None:
    formatter, row = OutputFormatter(tokenizer, model="m"), good_row({"id": "a", "prompt": "x"})
    ids = tokenizer.encode("again.")
    done = Completion(index=0, token_ids=ids, finish_reason="stop", stop_reason=ids[-1])
    params = SamplingParams(return_token_ids=True)
    result = written(formatter.finished(row, params, RequestOutput(prompt_tokens=1, completions=[done])))
    assert (result["text"], result["token_ids"], result["finish_reason"]) == ("again", ids, "stop")
    done = Completion(index=0, token_ids=ids, finish_reason="stop", stop_reason="ai", cut=2)
    params = SamplingParams(stop=("ai",))
    result = written(formatter.finished(row, params, RequestOutput(prompt_tokens=1, completions=[done])))
    assert result["text"] == "ag"
    assert "token_ids" not in result


def test_several_samples_and_logprobs(tokenizer: Tokenizer) -> None:
    formatter, row = OutputFormatter(tokenizer, model="m"), good_row({"id": "a", "prompt": "x"})
    first = tokenizer.encode("a")[0]
    logprobs = [[TokenLogprob(-math.inf, 9, first), TokenLogprob(-0.5, 1, 300)]]
    done = [Completion(index=index, token_ids=[first], finish_reason="length", logprobs=logprobs) for index in range(2)]
    scored = {"prompt": [first, first], "prompt_logprobs": [None, logprobs[0]]}
    output = RequestOutput(prompt_tokens=2, completions=done, **scored)
    result = written(formatter.finished(row, SamplingParams(n=2), output))
    assert set(result) == {"id", "choices", "usage", "prompt_logprobs"}
    assert [choice["index"] for choice in result["choices"]] == [0, 1]
    entry = {
        str(first): {"logprob": -9999.0, "rank": 9, "decoded_token": "a"},
        "300": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(300)},
    }
    assert result["choices"][1] == {"index": 1, "text": "a", "finish_reason": "length", "logprobs": [entry]}
    assert result["prompt_logprobs"] == [None, entry]
    assert result["usage"]["completion_tokens"] == 2


def test_openai_completions(tokenizer: Tokenizer) -> None:
    row = good_row({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "model": "asked"}})
    ids = tokenizer.encode("again é")
    logprobs = [[TokenLogprob(-1.0, 2, token_id), TokenLogprob(-0.5, 1, 300)] for token_id in ids]
    done = Completion(index=0, token_ids=ids, finish_reason="length", logprobs=logprobs)
    formatter = OutputFormatter(tokenizer, model="m", created=123)
    output = RequestOutput(prompt_tokens=1, completions=[done])
    line = formatter.finished(row, SamplingParams(), output)
    assert line == formatter.finished(row, SamplingParams(), output)
    result = written(line)
    assert set(result) == {"id", "custom_id", "response", "error"}
    assert (result["custom_id"], result["error"], result["response"]["status_code"]) == ("a", None, 200)
    assert result["id"].startswith("batch_req_")
    body = result["response"]["body"]
    assert (body["object"], body["model"], body["created"]) == ("text_completion", "asked", 123)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("again é", "length")
    tokens = choice["logprobs"]["tokens"]
    assert len(tokens) == len(choice["logprobs"]["text_offset"]) == len(ids)
    assert choice["logprobs"]["text_offset"][:2] == [0, len(tokens[0])]
    assert choice["logprobs"]["token_logprobs"] == [-1.0] * len(ids)
    assert choice["logprobs"]["top_logprobs"][0] == {tokens[0]: -1.0, tokenizer.token_text(300): -0.5}


def test_openai_chat(tokenizer: Tokenizer) -> None:
    row = good_row({"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": CHAT}})
    logprobs = [
        [TokenLogprob(-1.0, 1, token_id), TokenLogprob(-1.0, 1, token_id)] for token_id in tokenizer.encode("é")
    ]
    done = completion(tokenizer, "é", logprobs=logprobs)
    line = OutputFormatter(tokenizer, model="m").finished(
        row, SamplingParams(), RequestOutput(prompt_tokens=1, completions=[done])
    )
    body = written(line)["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "é", "refusal": None}
    content = choice["logprobs"]["content"]
    assert bytes(value for entry in content for value in entry["bytes"]) == "é".encode()
    assert content[0]["top_logprobs"] == [{key: content[0][key] for key in ("token", "logprob", "bytes")}]


def test_without_a_tokenizer_the_ids_are_the_answer() -> None:
    row = good_row({"id": "a", "prompt_token_ids": [1]})
    done = Completion(index=0, token_ids=[5, 6], finish_reason="length")
    line = OutputFormatter(None, model="m").finished(
        row, SamplingParams(), RequestOutput(prompt_tokens=1, completions=[done])
    )
    assert (written(line)["text"], written(line)["token_ids"]) == ("", [5, 6])


@pytest.mark.parametrize("kind", ["sentence_piece", "metaspace", "byte_level"])
def test_tokens_joined_are_the_text(kind: str, all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers[kind]
    prompt, ids = tokenizer.encode("The quick"), tokenizer.encode("and again", add_special_tokens=False)
    one = [[TokenLogprob(-1.0, 1, token_id)] for token_id in ids]
    scored: list[list[TokenLogprob] | None] = [[TokenLogprob(-1.0, 1, token_id)] for token_id in prompt]
    formatter = OutputFormatter(tokenizer, model="m")
    for preceding in (prompt[-2:], prompt[:1], []):
        done = Completion(index=0, token_ids=ids, finish_reason="length", logprobs=one)
        output = RequestOutput(
            prompt_tokens=len(prompt),
            completions=[done],
            preceding=preceding,
            prompt=prompt,
            prompt_logprobs=[None, *scored[1:]],
        )
        native = written(formatter.finished(good_row({"id": 1, "prompt": "x"}), SamplingParams(), output))
        assert "".join(_decoded(entry) for entry in native["logprobs"]) == native["text"] == formatter.texts(output)[0]
        shown = tokenizer.token_text(prompt[0], is_first=True) if kind != "sentence_piece" else ""
        assert shown + "".join(_decoded(entry) for entry in native["prompt_logprobs"][1:]) == "The quick"
        bodies = []
        for asked in ({"prompt": "x"}, {"messages": CHAT}):
            url = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
            row = good_row({"custom_id": "a", "url": url, "body": asked})
            bodies.append(written(formatter.finished(row, SamplingParams(), output))["response"]["body"])
        completions, chat = (body["choices"][0] for body in bodies)
        assert "".join(completions["logprobs"]["tokens"]) == completions["text"] == native["text"]
        shown = bytes(value for entry in chat["logprobs"]["content"] for value in entry["bytes"])
        assert shown.decode() == chat["message"]["content"] == native["text"]


def _decoded(entry: dict[str, Any]) -> str:
    (value,) = entry.values()
    return str(value["decoded_token"])


BATCH = {"custom_id": "b", "url": "/v1/completions"}


def test_every_output_row_leads_back_to_its_input_row(tokenizer: Tokenizer) -> None:
    lines = [
        {"id": 1, "prompt": "x"},
        {"id": "1", "prompt": "x"},
        {"id": "line:3", "prompt": ""},
        {"id": 1, "prompt": "x"},
        [],
        {"prompt": "x"},
        BATCH | {"body": {"prompt": "x"}},
        BATCH | {"body": {"prompt": "x"}},
        {"custom_id": "c", "url": "/v1/completions", "body": {"prompt": 5}},
        {"url": "/v1/chat/completions", "body": {"messages": CHAT}},
        {"id": 10**25, "prompt": "x"},
    ]
    formatter = OutputFormatter(tokenizer, model="m")
    output = RequestOutput(prompt_tokens=1, completions=[completion(tokenizer)])
    keys = set()
    for row in read_rows([json.dumps(line).encode() for line in lines], is_text=False):
        answer = formatter.bad(row) if isinstance(row, BadRow) else formatter.finished(row, SamplingParams(), output)
        assert key_of_output(answer) == (row.key, isinstance(row, BadRow))
        failed = formatter.failed(row, "server_error", "it broke")
        assert key_of_output(failed) == (row.key, True)
        assert '"type":"server_error","message":"it broke"' in failed.decode()
        keys.add(row.key)
    assert len(keys) == len(lines)


def test_error_rows() -> None:
    formatter = OutputFormatter(None, model="m")
    bad = only_row({"id": "a", "prompt": ""})
    assert isinstance(bad, BadRow)
    error = {"type": "invalid_request_error", "message": "prompt is empty; give at least one character"}
    assert written(formatter.bad(bad)) == {"id": "a", "error": error}
    (bad,) = read_rows([b"nonsense"], is_text=False)
    assert isinstance(bad, BadRow)
    result = written(formatter.bad(bad))
    assert (result["id"], result["line"], set(result)) == (None, 1, {"id", "line", "error"})
    batch = written(formatter.bad(BadRow(key="s:b", id="b", line=4, dialect="openai_chat", message="no")))
    assert (batch["custom_id"], batch["response"]["status_code"]) == ("b", 400)
    assert batch["response"]["body"]["error"] == batch["error"]


def test_lines_that_are_no_output_rows() -> None:
    for line in (b"", b"{", b'{"id": null}', b'{"id": 1.5}', b"\0\0", b"[1]", b"\xff", b'{"text": "x"}'):
        assert key_of_output(line) is None
