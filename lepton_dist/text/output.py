"""Rows out: what is written for a finished request or a bad row, in the dialect of its input row.

Every row is one line of JSON, ends in a newline, and can be traced back to its input row by `key_of_output`.
An error row, in either dialect, is one whose ``error`` is not null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.text.batch_output import batch_error, batch_response
from lepton_dist.text.completion import Completion, RequestOutput
from lepton_dist.text.detokenizer import finished_text
from lepton_dist.text.logprobs import native_logprobs, prompt_logprobs
from lepton_dist.text.rows import BadRow, PromptRow, key_of_id, key_of_line
from lepton_dist.text.tokenizer import Tokenizer


class OutputFormatter:
    """Writes the rows of one run.

    Args:
        tokenizer: None for a model without one; texts are empty then, and token ids always given.
        model: the name that OpenAI rows bear where the input row named none.
        created: seconds since 1970 that OpenAI rows bear; the run's start, so that a row does not depend on its hour.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, model: str, created: int = 0) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._created = created

    def finished(self, row: PromptRow, params: SamplingParams, output: RequestOutput) -> bytes:
        """The row of a request that ran; `params` are those it ran with."""
        texts = self.texts(output)
        has_token_ids = params.return_token_ids or self._tokenizer is None
        if row.dialect != "native":
            model = row.model or self._model
            return _line(batch_response(row, output, texts, self._tokenizer, has_token_ids, model, self._created))
        choices = [
            self._native_choice(completion, text, has_token_ids, output.preceding)
            for completion, text in zip(output.completions, texts, strict=True)
        ]
        result: dict[str, Any] = _identity(row)
        if len(choices) == 1:
            result.update(choices[0])
        else:
            result["choices"] = [
                {"index": completion.index, **choice}
                for completion, choice in zip(output.completions, choices, strict=True)
            ]
        result["usage"] = output.usage()
        if output.prompt_logprobs is not None:
            result["prompt_logprobs"] = prompt_logprobs(output, self._tokenizer)
        return _line(result)

    def failed(self, row: PromptRow | BadRow, kind: str, message: str) -> bytes:
        """The error row of a request that could not be run."""
        if row.dialect != "native":
            return _line(batch_error(row, kind, message))
        return _line({**_identity(row), "error": {"type": kind, "message": message}})

    def bad(self, row: BadRow) -> bytes:
        """The error row of a row that could not be read."""
        return self.failed(row, row.kind, row.message)

    def texts(self, output: RequestOutput) -> list[str]:
        """The text of each sample, as it continues the prompt's: without its stop string or ending token."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return [""] * len(output.completions)
        return [
            finished_text(
                tokenizer, one.token_ids, output.preceding, cut=one.cut, is_ended_by_token=one.is_ended_by_token
            )
            for one in output.completions
        ]

    def _native_choice(
        self, completion: Completion, text: str, has_token_ids: bool, preceding: Sequence[int]
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": text, "finish_reason": completion.finish_reason}
        if has_token_ids:
            choice["token_ids"] = completion.token_ids
        if completion.logprobs is not None:
            choice["logprobs"] = native_logprobs(completion.logprobs, self._tokenizer, preceding)
        return choice


class _Head(msgspec.Struct):
    """The fields of an output row that say which input row it answers, and how."""

    id: int | str | None = None
    custom_id: str | None = None
    line: int | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_HEAD_DECODER = msgspec.json.Decoder(_Head)


def key_of_output(line: bytes) -> tuple[str, bool] | None:
    """The key of the input row that an output row answers, and whether it is an error row.

    None for a line that is no output row: not JSON, or without an id.
    """
    try:
        head = _HEAD_DECODER.decode(line)
    except (ValueError, RecursionError):
        return None
    is_error = bytes(head.error) != b"null"
    if head.line is not None:
        return key_of_line(head.line), is_error
    row_id = head.id if head.custom_id is None else head.custom_id
    return None if row_id is None else (key_of_id(row_id), is_error)


def _identity(row: PromptRow | BadRow) -> dict[str, Any]:
    """What tells which row is answered: its id, and its line where that is its key."""
    return {"id": row.id, "line": row.line} if row.is_keyed_by_line else {"id": row.id}


def _line(row: dict[str, Any]) -> bytes:
    return msgspec.json.encode(row) + b"\n"
