"""How tokens are chosen: the sampling parameters of a request, their ranges and where their values come from.

Field names are OpenAI's, and vLLM's where OpenAI has none. A value is taken from the first of: the input row, the
command's options, the checkpoint's ``generation_config.json``, the defaults below.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lepton_dist.errors import CheckpointError, RequestError

_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1
_MAX_COUNT = 2**31 - 1
_MAX_TOKEN_ID = 2**31 - 1

# field -> (lowest, highest, whether the lowest itself is allowed)
_REAL_FIELDS: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, math.inf, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}
_INTEGER_FIELDS: Mapping[str, tuple[int, int]] = {
    "max_tokens": (1, _MAX_COUNT),
    "top_k": (-1, _MAX_COUNT),
    "seed": (_INT64_MIN, _UINT64_MAX),
    "n": (1, 128),
    "logprobs": (0, 20),
    "prompt_logprobs": (0, 20),
}
_BOOLEAN_FIELDS = ("ignore_eos", "return_token_ids")
_LIMITS_OF_CHANCE = ("top_k", "top_p", "min_p")
_CHECKPOINT_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen, and when it ends.

    The constructor checks nothing, so that it stays cheap: call `validated` on values that come from outside.

    Attributes:
        max_tokens: most tokens to generate for each of the `n` samples.
        temperature: 0 is greedy; 0..2.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; above 0, at most 1.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0..1.
        repetition_penalty: divides (or, below zero, multiplies) logits of tokens seen in prompt or output; above 0.
        presence_penalty: taken off the logits of tokens seen in the output; -2..2.
        frequency_penalty: the same, times how often they were seen; -2..2.
        seed: 64 bits, signed or unsigned; None lets `request_seed` make one from the request's id.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the text, besides the model's own.
        n: independent samples of one prompt; 1..128.
        logprobs: None, or how many of the likeliest tokens to report beside each generated one; 0..20.
        prompt_logprobs: the same for the prompt's tokens.
        ignore_eos: go on after the model's end token; it may still be generated.
        return_token_ids: report the generated token ids.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False

    def validated(self) -> SamplingParams:
        """The same parameters with every value checked, a single stop string put in a tuple, numbers made real.

        Raises:
            RequestError: names the field, its value and what is allowed.
        """
        return SamplingParams(**checked_fields(msgspec.structs.asdict(self)))

    @classmethod
    def merged(cls, *sources: Mapping[str, Any]) -> SamplingParams:
        """Parameters from several sources of fields, the first that has a field winning; None means "not given".

        The order in a run is: row, command's options, `checkpoint_defaults`.

        Raises:
            RequestError: an unknown field, or a value out of range.
            CheckpointError: a value of the checkpoint's is needed and of no use.
        """
        fields: dict[str, Any] = {}
        for source in reversed(sources):
            fields.update((name, value) for name, value in source.items() if value is not None)
        unusable = [name for name, value in fields.items() if isinstance(value, Unusable)]
        for name in unusable:
            # Without chance, what limits it is not needed.
            if name not in _LIMITS_OF_CHANCE or fields.get("temperature") != 0:
                raise CheckpointError(
                    f"{fields[name].problem}; a row's {name} or the option --{name.replace('_', '-')} overrides it"
                )
            del fields[name]
        return cls(**checked_fields(fields))

    @property
    def has_penalties(self) -> bool:
        """Whether what was written before counts against a token."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


SAMPLING_FIELDS: frozenset[str] = frozenset(SamplingParams.__struct_fields__)


def checked_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given sampling fields, checked and in their own types; None values are left out.

    Raises:
        RequestError: names the field, its value and what is allowed.
    """
    checked: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name in _REAL_FIELDS:
            checked[name] = _real(name, value)
        elif name in _INTEGER_FIELDS:
            checked[name] = _integer(name, value)
        elif name in _BOOLEAN_FIELDS:
            if not isinstance(value, bool):
                raise RequestError(f"{name} is {shown_value(value)}; it must be true or false")
            checked[name] = value
        elif name == "stop":
            checked[name] = _stop_strings(value)
        elif name == "stop_token_ids":
            checked[name] = _stop_token_ids(value)
        else:
            raise RequestError(f"unknown sampling field {name!r}; known: {', '.join(sorted(SAMPLING_FIELDS))}")
    return checked


@dataclass(frozen=True)
class Unusable:
    """A value of a checkpoint that is of the wrong type or out of range: an error only for who needs it."""

    problem: str


def checkpoint_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults out of the values of a checkpoint's ``generation_config.json``.

    As vLLM does, `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` are used where present, whatever
    ``do_sample`` says; nothing else is. A value that is none is `Unusable`.
    """
    found: dict[str, Any] = {}
    for name in _CHECKPOINT_FIELDS:
        value = generation_config.get(name)
        if name in _INTEGER_FIELDS and isinstance(value, float) and value.is_integer():
            value = int(value)  # some tools write 50.0
        try:
            found.update(checked_fields({name: value}))
        except RequestError as error:
            found[name] = Unusable(f"generation_config.json: {error}")
    return found


def request_seed(base_seed: int, request_id: str | int) -> int:
    """The 64-bit seed of a request that has none: a stable hash of the run's seed and the request's id.

    It depends on nothing else, so a request keeps its text when a run is resumed or laid out differently. The id's
    type counts: 1 and "1" give different seeds.
    """
    kind = "i" if isinstance(request_id, int) else "s"
    # surrogatepass: an id from a Python caller may hold lone surrogates, and a seed must exist for every id.
    text = f"{base_seed}:{kind}:{request_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def shown_value(value: Any) -> str:
    """A value for an error message: numbers as they are, anything else by its type, since it may hold prompt text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # Python refuses to print integers of more than some thousand digits.
        return str(value) if abs(value) < 10**30 else "a number of more than 30 digits"
    if isinstance(value, float):
        return str(value)
    name = type(value).__name__
    return {"str": "a string", "list": "a list", "tuple": "a list", "dict": "an object"}.get(name, name)


def _real(name: str, value: Any) -> float:
    lowest, highest, is_lowest_allowed = _REAL_FIELDS[name]
    if lowest == 0.0 and highest == math.inf:
        allowed = "a number above 0"
    elif is_lowest_allowed:
        allowed = f"a number from {lowest:g} to {highest:g}"
    else:
        allowed = f"a number above {lowest:g}, at most {highest:g}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN fails every comparison; the last one refuses infinity, and integers too large for a float.
    if is_number and lowest <= value <= highest and (is_lowest_allowed or value != lowest) and value < 1e30:
        return float(value)
    raise RequestError(f"{name} is {shown_value(value)}; it must be {allowed}")


def _integer(name: str, value: Any) -> int:
    lowest, highest = _INTEGER_FIELDS[name]
    if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
        return value
    raise RequestError(f"{name} is {shown_value(value)}; it must be a whole number from {lowest} to {highest}")


def _stop_strings(value: Any) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise RequestError(f"stop is {shown_value(value)}; it must be a string or a list of strings")
    for index, item in enumerate(items):
        if not isinstance(item, str) or not item:
            problem = "an empty string" if item == "" else shown_value(item)
            raise RequestError(f"stop[{index}] is {problem}; it must be a string of at least one character")
        if not is_encodable(item):
            raise RequestError(f"stop[{index}] holds a lone surrogate; it must be valid Unicode text")
    return tuple(items)


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogates, which JSON escapes can smuggle in."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise RequestError(f"stop_token_ids is {shown_value(value)}; it must be a list of token ids")
    for index, item in enumerate(value):
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item <= _MAX_TOKEN_ID:
            raise RequestError(
                f"stop_token_ids[{index}] is {shown_value(item)}; it must be a whole number from 0 to {_MAX_TOKEN_ID}"
            )
    return tuple(value)
