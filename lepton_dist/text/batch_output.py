"""Output rows of OpenAI's batch dialect: completions, chats and errors, each in an envelope with its ``custom_id``.

Ids are hashes of the row's key, so that a row that is run again bears the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from lepton_dist.text.completion import Completion, RequestOutput
from lepton_dist.text.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from lepton_dist.text.rows import BadRow, PromptRow
from lepton_dist.text.tokenizer import Tokenizer

_STATUS_BAD_REQUEST = 400
_STATUS_FAILED = 500


def batch_response(
    row: PromptRow,
    output: RequestOutput,
    texts: list[str],
    tokenizer: Tokenizer | None,
    has_token_ids: bool,
    model: str,
    created: int,
) -> dict[str, Any]:
    """The row of a request that ran: ``response`` holds a ``chat.completion`` or ``text_completion``, error is null."""
    is_chat = row.dialect == "openai_chat"
    choices = [
        _choice(completion, text, tokenizer, is_chat, has_token_ids, output.preceding)
        for completion, text in zip(output.completions, texts, strict=True)
    ]
    body: dict[str, Any] = {
        "id": ("chatcmpl-" if is_chat else "cmpl-") + _digest(row.key),
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": output.usage(),
    }
    if output.prompt_logprobs is not None:
        # OpenAI has no shape for these: as in the native dialect.
        body["prompt_logprobs"] = prompt_logprobs(output, tokenizer)
    return _envelope(row, {"status_code": 200, "request_id": "req_" + _digest(row.key), "body": body}, None)


def batch_error(row: PromptRow | BadRow, kind: str, message: str) -> dict[str, Any]:
    """The row of a request that could not be run; the error stands in the response's body and beside it."""
    status = _STATUS_BAD_REQUEST if kind == "invalid_request_error" else _STATUS_FAILED
    error = {"type": kind, "message": message, "param": None, "code": None}
    response = {"status_code": status, "request_id": "req_" + _digest(row.key), "body": {"error": error}}
    result = _envelope(row, response, error)
    if isinstance(row, BadRow) and row.is_keyed_by_line:
        result["line"] = row.line
    return result


def _envelope(row: PromptRow | BadRow, response: dict[str, Any], error: dict[str, Any] | None) -> dict[str, Any]:
    return {"id": "batch_req_" + _digest(row.key), "custom_id": row.id, "response": response, "error": error}


def _choice(
    completion: Completion,
    text: str,
    tokenizer: Tokenizer | None,
    is_chat: bool,
    has_token_ids: bool,
    preceding: Sequence[int],
) -> dict[str, Any]:
    logprobs: dict[str, Any] | None = None
    if completion.logprobs is not None:
        shape = chat_logprobs if is_chat else completion_logprobs
        logprobs = shape(completion.logprobs, tokenizer, preceding)
    content = {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    choice = {
        "index": completion.index,
        **content,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
    }
    return {**choice, "token_ids": completion.token_ids} if has_token_ids else choice


def _digest(key: str) -> str:
    return hashlib.blake2b(key.encode("utf-8"), digest_size=12).hexdigest()
