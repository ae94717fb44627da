"""The fields of one request, in each dialect, checked and brought into one form.

Fields that ask for nothing beyond what is done anyway are accepted and ignored (`_INERT_FIELDS`); fields that ask for
something that is not done are refused unless they hold the value that asks for nothing (`_NEUTRAL_FIELDS`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lepton_dist.config.sampling import SAMPLING_FIELDS, checked_fields, is_encodable, shown_value
from lepton_dist.errors import RequestError

_MAX_TOKEN_ID = _MAX_HINT = 2**31 - 1
_ALIASES = {"max_completion_tokens": "max_tokens"}

# Who asks, and what the service should do with the request: nothing that changes the text.
_INERT_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
# field -> values that ask for nothing; null always does.
_NEUTRAL_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
}


def native_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`PromptRow` values of a native row: its prompt in one of three forms, and its sampling fields.

    Raises:
        RequestError: names the field that is wrong.
    """
    forms = {"prompt": _text_prompt, "prompt_token_ids": _token_ids, "messages": _messages}
    return _request(fields, forms, {"id"})


def completion_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """`PromptRow` values of the body of a ``/v1/completions`` row, where a prompt may be text or token ids.

    Raises:
        RequestError: names the field that is wrong.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        raise RequestError(f"prompt holds {len(prompt)} prompts; give each a row of its own")
    name, form = ("prompt_token_ids", _token_ids) if isinstance(prompt, list) else ("prompt", _text_prompt)
    if "prompt_token_ids" in body:
        raise RequestError("unknown field 'prompt_token_ids'; in this dialect token ids go into prompt")
    rest = {field: value for field, value in body.items() if field != "prompt"}
    return _request({**rest, name: prompt}, {name: form}, set())


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """`PromptRow` values of the body of a ``/v1/chat/completions`` row.

    ``logprobs`` is a boolean there and ``top_logprobs`` the count; they become the one field `logprobs`.

    Raises:
        RequestError: names the field that is wrong.
    """
    fields = dict(body)
    wanted, count = fields.pop("logprobs", None), fields.pop("top_logprobs", None)
    if wanted is not None and not isinstance(wanted, bool):
        raise RequestError(f"logprobs is {shown_value(wanted)}; it must be true or false, the count is top_logprobs")
    if count is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs: true")
    if wanted:
        try:
            checked_fields({"logprobs": count})
        except RequestError as error:
            raise RequestError(f"top_{error}") from None
        fields["logprobs"] = 0 if count is None else count
    return _request(fields, {"messages": _messages}, set())


def _request(
    fields: Mapping[str, Any], forms: Mapping[str, Callable[[Any], Any]], identity: set[str]
) -> dict[str, Any]:
    given = [name for name in forms if fields.get(name) is not None]
    if len(given) != 1:
        problem = f"has both {given[0]} and {given[1]}" if given else "has no prompt"
        raise RequestError(f"the row {problem}; give one of: {', '.join(forms)}")
    values: dict[str, Any] = {given[0]: forms[given[0]](fields[given[0]])}
    sampling: dict[str, Any] = {}
    for name, value in fields.items():
        target = _ALIASES.get(name, name)
        if name in forms or name in identity or name in _INERT_FIELDS or (value is None and _is_known(name)):
            continue
        if target in SAMPLING_FIELDS:
            if target in sampling and sampling[target] != value:
                raise RequestError(f"{target} is given twice, with different values")
            sampling[target] = value
        elif name == "model":
            values["model"] = _model_name(value)
        elif name == "tools":
            values["tools"] = _tools(value)
        elif name == "hint":
            values["hint"] = _hint(value)
        elif name in _NEUTRAL_FIELDS:
            _check_neutral(name, value)
        else:
            raise RequestError(f"unknown field {name[:40]!r}")
    if fields.get("tool_choice") == "none":
        values.pop("tools", None)
    return {**values, "overrides": checked_fields(sampling)}


def _is_known(name: str) -> bool:
    return name in SAMPLING_FIELDS or name in _ALIASES or name in _NEUTRAL_FIELDS or name in ("model", "tools", "hint")


def _check_neutral(name: str, value: Any) -> None:
    # 0 == False and 1 == True in Python, so the type is compared too.
    if not any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL_FIELDS[name]):
        raise RequestError(f"{name} is {shown_value(value)}; this is not supported here, leave the field out")


def _text_prompt(value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"prompt is {shown_value(value)}; it must be a string")
    if not value:
        raise RequestError("prompt is empty; give at least one character")
    return _encodable(value, "prompt")


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise RequestError(f"prompt_token_ids is {shown_value(value)}; it must be a list of token ids")
    if not value:
        raise RequestError("prompt_token_ids is empty; give at least one token id")
    for place, token_id in enumerate(value):
        if type(token_id) is not int or not 0 <= token_id <= _MAX_TOKEN_ID:
            raise RequestError(
                f"prompt_token_ids[{place}] is {shown_value(token_id)}; it must be a whole number from 0 on, "
                "below the model's vocabulary size"
            )
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise RequestError(f"messages is {shown_value(value)}; it must be a list of messages")
    if not value:
        raise RequestError("messages is empty; give at least one message")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} is {shown_value(message)}; it must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{place}.role is {shown_value(role)}; it must be a string such as user")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise RequestError(f"{place}.content is missing; it must be a string")
    return {**message, "content": None if content is None else _content(content, f"{place}.content")}


def _content(content: Any, place: str) -> str:
    """A message's text; parts of text become one, a line each, since most templates know strings only."""
    if isinstance(content, str):
        return _encodable(content, place)
    if not isinstance(content, list):
        raise RequestError(f"{place} is {shown_value(content)}; it must be a string or a list of text parts")
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(f'{place}[{number}] must be {{"type": "text", "text": "..."}}; other parts are not read')
        texts.append(_encodable(text, f"{place}[{number}].text"))
    return "\n".join(texts)


def _tools(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RequestError(f"tools is {shown_value(value)}; it must be a list of objects")
    return value


def _hint(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_HINT:
        raise RequestError(
            f"hint is {shown_value(value)}; it must be a whole number from 1 to {_MAX_HINT}, the tokens that you "
            "expect in the output"
        )
    return value


def _model_name(value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError(f"model is {shown_value(value)}; it must be a string")
    return _encodable(value, "model")


def _encodable(text: str, place: str) -> str:
    if not is_encodable(text):
        raise RequestError(f"{place} holds a lone surrogate (half of a UTF-16 pair); it must be valid Unicode text")
    return text
