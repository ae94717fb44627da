"""Rows in: a streaming reader of prompts, one row a line, that never stops at a bad row.

A ``.txt`` file holds a prompt a line. Any other file is JSON Lines, each row either native (``{"id", "prompt"}`` and
its kin) or an OpenAI batch row (``{"custom_id", "method", "url", "body"}``); a file may mix them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from lepton_dist.config.sampling import is_encodable, shown_value
from lepton_dist.errors import RequestError, UsageError
from lepton_dist.files import open_regular
from lepton_dist.text.request_fields import chat_request, completion_request, native_request
from lepton_dist.text.rows import BadRow, Dialect, PromptRow, key_of_id, key_of_line

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What files begin with that are no lines of UTF-8, and what to do about them.
_OTHER_KINDS = (
    (b"\x1f\x8b", "gzip", "unpack it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it first (unzstd)"),
    (b"\xfd7zXZ\0", "xz", "unpack it first (unxz)"),
    (b"BZh", "bzip2", "unpack it first (bunzip2)"),
    (b"PK\x03\x04", "zip", "unpack it first (unzip)"),
    (b"PAR1", "Parquet", "write its rows as JSON Lines first"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
)
# Whole numbers beyond this are no ids, and Python is slow to print them.
_ID_LIMIT = 10**30
_BATCH_MARKS = ("custom_id", "body", "url")
_BATCH_URLS: Mapping[str, Dialect] = {
    "/v1/completions": "openai_completions",
    "/v1/chat/completions": "openai_chat",
}


def open_input(path: str | Path) -> BufferedReader:
    """Open an input file for `read_rows`.

    Raises:
        UsageError: it is absent, no regular file (a pipe can be read only once), cannot be read, or is compressed or
            of another kind than UTF-8 text.
    """
    try:
        stream = open_regular(path)
        start = stream.peek(8)
    except OSError as error:
        raise UsageError(f"{path}: the input cannot be read: {error.strerror}") from None
    for mark, kind, advice in _OTHER_KINDS:
        if start.startswith(mark):
            stream.close()
            raise UsageError(f"{path}: the input looks like {kind}, but rows are lines of UTF-8 text: {advice}")
    return stream


def is_text_path(path: str | Path) -> bool:
    """Whether a file is a prompt a line, by its name; else it is JSON Lines."""
    return Path(path).suffix.lower() == ".txt"


class _Named(msgspec.Struct):
    id: int | str | None = None
    custom_id: int | str | None = None


_NAME_DECODER = msgspec.json.Decoder(_Named)


def key_of_input(line: bytes, number: int) -> str:
    """The key that a line of JSON will have, unless an earlier one has it; of a ``.txt`` file it is that of its number.

    Far cheaper than reading the row: nothing of it but its name is looked at.
    """
    try:
        named = _NAME_DECODER.decode(line)
    except (ValueError, RecursionError):
        return key_of_line(number)
    row_id = named.id if named.custom_id is None else named.custom_id
    return key_of_line(number) if row_id is None else key_of_id(row_id)


def count_rows(path: str | Path) -> int:
    """How many rows `read_rows` will give: lines that are not blank.

    Raises:
        UsageError: as `open_input`.
    """
    with open_input(path) as stream:
        return sum(1 for line in stream if line.strip() and line.strip() != _BYTE_ORDER_MARK)


def read_rows(lines: Iterable[bytes], *, is_text: bool) -> Iterator[PromptRow | BadRow]:
    """Rows of an input, in order, one line in memory at a time; of earlier rows only the keys are kept.

    Args:
        lines: a binary file, or lines of one; with LF or CRLF, the last with or without it. Blank ones are skipped.
        is_text: a prompt a line, instead of JSON Lines.

    Yields:
        A `PromptRow`, or a `BadRow` for a line that cannot be run: not UTF-8, not JSON, an id used before, a wrong
        type, a value out of range, an unknown field, an empty prompt.
    """
    used: set[str] = set()
    for number, raw in enumerate(lines, start=1):
        line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
        if not line.strip():
            continue
        row = _text_row(line, number) if is_text else _json_row(line, number, used)
        used.add(row.key)
        yield row


def _text_row(line: bytes, number: int) -> PromptRow | BadRow:
    try:
        prompt = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        # A row of a .txt file is known by its line number in any case.
        return BadRow(key=key_of_id(number), id=number, line=number, message=_not_utf8(error))
    return PromptRow(key=key_of_id(number), id=number, line=number, prompt=prompt)


def _json_row(line: bytes, number: int, used: set[str]) -> PromptRow | BadRow:
    try:
        fields = _parsed(line)
    except RequestError as error:
        return BadRow(key=key_of_line(number), id=None, line=number, message=str(error))
    is_batch = any(mark in fields for mark in _BATCH_MARKS)
    dialect = _batch_dialect(fields) if is_batch else "native"
    row_id: str | int | None = None
    key = key_of_line(number)
    try:
        row_id = _row_id(fields, is_batch)
        if row_id is None:  # its key stays that of its line, which no id can be
            row_id = number
        elif key_of_id(row_id) in used:
            raise RequestError(f"the id of line {number} was used by an earlier row; give every row its own")
        else:
            key = key_of_id(row_id)
        values = _batch_values(fields) if is_batch else native_request(fields)
        return PromptRow(key=key, id=row_id, line=number, dialect=dialect, **values)
    except RequestError as error:
        return BadRow(key=key, id=row_id, line=number, dialect=dialect, kind=error.kind, message=str(error))


def _parsed(line: bytes) -> Mapping[str, Any]:
    try:
        value = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        # The standard parser is slower, but reads a few things beyond the norm (NaN, halves of surrogate pairs), so
        # that such a row is refused by name, and it says in which column a real fault lies.
        value = _parsed_leniently(line)
    if not isinstance(value, dict):
        raise RequestError(f"the line holds {shown_value(value)}; a row is a JSON object")
    return value


def _parsed_leniently(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(_not_utf8(error)) from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the line is not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise RequestError("the line is not JSON that can be read: it nests too deep or holds a huge number") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"the line is not UTF-8 text: {error.reason} at byte {error.start + 1} of the line"


def _row_id(fields: Mapping[str, Any], is_batch: bool) -> str | int | None:
    """A row's own id; None for a native row without one."""
    name = "custom_id" if is_batch else "id"
    value = fields.get(name)
    if value is None and not is_batch:
        return None
    if isinstance(value, str) and value and is_encodable(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and not is_batch and abs(value) < _ID_LIMIT:
        return value
    problem = shown_value(value)
    if isinstance(value, str):
        problem = "an empty string" if not value else "not valid Unicode text"
    raise RequestError(f"{name} is {problem}; it must be a string" + ("" if is_batch else " or a whole number"))


def _batch_dialect(fields: Mapping[str, Any]) -> Dialect:
    url = fields.get("url")
    return _BATCH_URLS.get(url, "openai_completions") if isinstance(url, str) else "openai_completions"


def _batch_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = {name for name, value in fields.items() if value is not None}
    unknown = sorted(given - {"custom_id", "method", "url", "body"})
    if unknown:
        raise RequestError(
            f"unknown field {_name(unknown[0])} beside custom_id, method, url and body; request fields go into body"
        )
    if (fields.get("method") or "POST") != "POST":
        raise RequestError("method must be POST")
    url, body = fields.get("url"), fields.get("body")
    if not isinstance(url, str) or url not in _BATCH_URLS:
        raise RequestError(f"url must be one of: {', '.join(_BATCH_URLS)}")
    if not isinstance(body, dict):
        raise RequestError(f"body is {shown_value(body)}; it must be an object")
    return chat_request(body) if _BATCH_URLS[url] == "openai_chat" else completion_request(body)


def _name(field: str) -> str:
    return repr(field[:40])
