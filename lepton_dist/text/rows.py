"""One row of input, good or bad, and the key by which it is known in the input and in the output."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Dialect = Literal["native", "openai_completions", "openai_chat"]


class PromptRow(msgspec.Struct, kw_only=True):
    """A request to run. Exactly one of `prompt`, `prompt_token_ids` and `messages` is given.

    Attributes:
        key: the row's identity in this input: of its id, or of its line where it has none.
        id: as the user wrote it; the line number where there was none.
        line: from 1.
        dialect: how the answer is written.
        prompt: text, to be encoded with the tokenizer's own special tokens.
        prompt_token_ids: ids, taken as they are.
        messages: a chat, to be rendered with the model's template.
        tools: tool descriptions for the template.
        overrides: the row's own sampling fields, checked, by `SamplingParams` name.
        model: the model name the row asked for, which its answer repeats.
        hint: how many tokens its sender expects in the output, which helps to balance; it bounds nothing.
    """

    key: str
    id: str | int
    line: int
    dialect: Dialect = "native"
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    overrides: dict[str, Any] = {}
    model: str | None = None
    hint: int | None = None

    @property
    def is_keyed_by_line(self) -> bool:
        """Whether the row is known by its line, because it has no id."""
        return self.key == key_of_line(self.line)


class BadRow(msgspec.Struct, kw_only=True):
    """A row that cannot be run: its answer is an error row.

    Attributes:
        key: from the id where it is known and unused; else from the line.
        id: the row's id where it could be read.
        line: from 1.
        kind: the error's type, such as "invalid_request_error".
        message: what is wrong and what to change; never the prompt's text.
    """

    key: str
    id: str | int | None
    line: int
    dialect: Dialect = "native"
    kind: str = "invalid_request_error"
    message: str

    @property
    def is_keyed_by_line(self) -> bool:
        """Whether the row is known by its line, because its id is absent, unreadable or was used before."""
        return self.key == key_of_line(self.line)


def key_of_id(row_id: str | int) -> str:
    """The key of a row that has an id of its own; 1 and "1" are different rows."""
    return f"i:{row_id}" if isinstance(row_id, int) else f"s:{row_id}"


def key_of_line(line: int) -> str:
    """The key of a row that is only known by where it stands, counted from 1."""
    return f"line:{line}"
