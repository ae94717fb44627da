"""The fields of one request, in each dialect, checked and brought into one form.

Fields that ask for nothing beyond what is done anyway are accepted and ignored (`_INERT_FIELDS`); fields that ask for
something that is not done are refused unless they hold a value that asks for nothing (`_NEUTRAL_FIELDS`, and any null).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lepton_dist.config.sampling import SAMPLING_FIELDS, checked_fields, is_encodable, shown_value
from lepton_dist.errors import RequestError
from lepton_dist.text.messages import checked_messages

_MAX_TOKEN_ID = _MAX_HINT = 2**31 - 1
_COUNTS_OF_LOGPROBS = ("logprobs", "prompt_logprobs")
_ALIASES = {"max_completion_tokens": "max_tokens"}

# Who asks, how the request is to be served, and what the service should do with it: nothing that changes the text.
_INERT_FIELDS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "request_id",
        "cache_prompt",
        "timeout",
        "guided_decoding_backend",
    }
)
_EMPTY: tuple[Any, ...] = ([], {}, "")
# field -> the values with which it asks for nothing, whatever the dialect. Names of OpenAI's, vLLM's, and of what
# else sends or answers such requests. Any field asks for nothing where it is null.
_NEUTRAL_FIELDS: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": _EMPTY,
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "stream_options": ({}, {"include_usage": False}, {"include_usage": True}),  # usage is given in any case
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM: sampling
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "detokenize": (True,),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),  # says nothing where special tokens are skipped
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # vLLM: structure
    "guided_choice": _EMPTY,
    "guided_grammar": _EMPTY,
    "guided_json": (),
    "guided_json_object": (False,),
    "guided_regex": _EMPTY,
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "structured_outputs": ({},),
    # vLLM: prompts and serving
    "add_generation_prompt": (True,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "include_reasoning": (True,),
    "kv_transfer_params": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "vllm_xargs": ({},),
    # others: SGLang, llama.cpp, transformers
    "ebnf": _EMPTY,
    "extra_body": ({},),
    "extra_headers": ({},),
    "extra_query": ({},),
    "json_schema": (),
    "lora_path": (),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "regex": _EMPTY,
    "separate_reasoning": (True,),
    "stream_reasoning": (True, False),
    "top_a": (0,),
    "typical_p": (1.0,),
    "repeat_penalty": (1.0,),
    "mirostat": (0,),
}
# The tokenizer's own special tokens: prompts of text get them, rendered chats do not.
_ADD_SPECIAL_TOKENS = "add_special_tokens"


def native_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`PromptRow` values of a native row: its prompt in one of three forms, and its sampling fields.

    Raises:
        RequestError: names the field that is wrong.
    """
    forms = {"prompt": _text_prompt, "prompt_token_ids": _token_ids, "messages": checked_messages}
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
    wanted = None if wanted == 0 else wanted  # no, however it is written
    if wanted is not None and not isinstance(wanted, bool):
        raise RequestError(f"logprobs is {shown_value(wanted)}; it must be true or false, the count is top_logprobs")
    if count and not wanted:
        raise RequestError("top_logprobs needs logprobs: true")
    if wanted:
        try:
            checked_fields({"logprobs": count})
        except RequestError as error:
            raise RequestError(f"top_{error}") from None
        fields["logprobs"] = 0 if count is None else count
    return _request(fields, {"messages": checked_messages}, set())


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
        if value is None or name in forms or name in identity or name in _INERT_FIELDS:
            continue
        if name in _COUNTS_OF_LOGPROBS and value is False:  # as in a chat, where logprobs says whether at all
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
            _check_neutral(name, value, _NEUTRAL_FIELDS[name])
        elif name == _ADD_SPECIAL_TOKENS:
            _check_neutral(name, value, ("messages" not in values,))
        else:
            raise RequestError(f"unknown field {name[:40]!r}")
    if fields.get("tool_choice") == "none":
        values.pop("tools", None)
    return {**values, "overrides": checked_fields(sampling)}


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if not any(_is_same(value, one) for one in neutral):
        raise RequestError(f"{name} is {shown_value(value)}; this is not supported here, leave the field out")


def _is_same(value: Any, other: Any) -> bool:
    # 0 == False and 1 == True in Python; but 1 is 1.0 to who writes JSON.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


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
