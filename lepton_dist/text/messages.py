"""Messages of a chat as templates expect them, from what OpenAI's clients send.

As transformers does, keys whose value is null are dropped and reasoning is given under every name that templates read;
as vLLM does, a tool call's ``arguments``, a string of JSON in OpenAI's API, become what it says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_dist.config.sampling import is_encodable, shown_value
from lepton_dist.errors import RequestError

# type of a part of a message's content -> its key with the text
_TEXT_PARTS: Mapping[str, str] = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
# The first of them that a message has stands for all.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Who may say nothing: an assistant that calls a tool or refuses, and a tool without a result.
_SILENT_ROLES = ("assistant", "tool", "function")


def checked_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a request, as they came.

    Raises:
        RequestError: names the message and the field that is wrong.
    """
    if not isinstance(value, list):
        raise RequestError(f"messages is {shown_value(value)}; it must be a list of messages")
    if not value:
        raise RequestError("messages is empty; give at least one message")
    for number, message in enumerate(value):
        _check(message, f"messages[{number}]")
    return value


def messages_for_template(messages: Sequence[Mapping[str, Any]], *, takes_parts: bool) -> list[dict[str, Any]]:
    """Checked messages as plain data of their own, for a template.

    Args:
        takes_parts: the template goes through the parts of a content itself. Else parts of text become one text, a
            line each, since most templates know strings only.
    """
    return [_message(message, takes_parts) for message in messages]


def _message(message: Mapping[str, Any], takes_parts: bool) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING_KEYS if name in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    content = kept.get("content")
    if isinstance(content, list) and not takes_parts:
        kept["content"] = "\n".join(_text_of(part) or "" for part in content)
    if "tool_calls" in kept:
        kept["tool_calls"] = [_tool_call(call) for call in kept["tool_calls"]]
        if not kept["tool_calls"]:  # to a template that only looks whether the key is there
            del kept["tool_calls"]
    # A round trip through JSON keeps the template away from the caller's objects.
    plain: dict[str, Any] = json.loads(json.dumps(kept))
    return plain


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return dict(call)
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(value: Any) -> Any:
    """What a call's arguments say; text that is no JSON object or list stays text."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    if not value.strip():
        return {}
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, (dict, list)) else value


def _text_of(part: Any) -> str | None:
    """The text of one part of a content; None for a part of another kind."""
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        part = part.get(_TEXT_PARTS.get(part["type"], ""))
    return part if isinstance(part, str) else None


def _check(message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise RequestError(f"{place} is {shown_value(message)}; it must be an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{place}.role is {shown_value(role)}; it must be a string such as user")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RequestError(f"{place}.tool_calls is {shown_value(calls)}; it must be a list of objects")
    if content is None:
        if role not in _SILENT_ROLES:
            raise RequestError(f"{place}.content is missing; it must be a string")
        return
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(f"{place}.content is {shown_value(content)}; it must be a string or a list of text parts")
    for number, part in enumerate(parts):
        where = f"{place}.content" if isinstance(content, str) else f"{place}.content[{number}]"
        text = _text_of(part)
        if text is None:
            raise RequestError(f'{where} must be {{"type": "text", "text": "..."}}; other parts are not read')
        if not is_encodable(text):
            raise RequestError(f"{where} holds a lone surrogate (half of a UTF-16 pair); it must be valid Unicode text")
