"""Log-probabilities of tokens in their three shapes: native, OpenAI's for completions and OpenAI's for chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lepton_dist.text.completion import RequestOutput, TokenLogprob
from lepton_dist.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for a token that could not have been chosen.
_LOWEST_LOGPROB = -9999.0


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; minus infinity and NaN become -9999."""
    return _LOWEST_LOGPROB if math.isnan(logprob) else max(logprob, _LOWEST_LOGPROB)


def native_logprobs(
    positions: Sequence[list[TokenLogprob]], tokenizer: Tokenizer | None, preceding: Sequence[int]
) -> list[dict[str, Any]]:
    """One entry a token: ``{token_id: {"logprob", "rank", "decoded_token"}}``; `preceding`: what precedes the first."""
    firsts = _firsts([position[0].token_id for position in positions], tokenizer, preceding)
    return [_native_entry(position, tokenizer, first) for position, first in zip(positions, firsts, strict=True)]


def prompt_logprobs(output: RequestOutput, tokenizer: Tokenizer | None) -> list[dict[str, Any] | None]:
    """The same for the tokens of a prompt, with null for the first one; `output` has the prompt and them."""
    positions = [position for position in output.prompt_logprobs or [] if position is not None]
    return [None, *native_logprobs(positions, tokenizer, (output.prompt or [])[:1])]


def completion_logprobs(
    positions: Sequence[list[TokenLogprob]], tokenizer: Tokenizer | None, preceding: Sequence[int]
) -> dict[str, Any]:
    """The ``logprobs`` of a completion's choice: four lists of one entry a token.

    ``text_offset`` counts the characters of the tokens before, as they read one by one.
    """
    firsts = _firsts([position[0].token_id for position in positions], tokenizer, preceding)
    tokens = [_text(position[0], tokenizer, first) for position, first in zip(positions, firsts, strict=True)]
    offsets, offset = [], 0
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(position[0].logprob) for position in positions],
        # Of two tokens with the same text the likelier is kept, which comes first.
        "top_logprobs": [
            {_text(item, tokenizer, first): finite(item.logprob) for item in reversed(position)}
            for position, first in zip(positions, firsts, strict=True)
        ],
        "text_offset": offsets,
    }


def chat_logprobs(
    positions: Sequence[list[TokenLogprob]], tokenizer: Tokenizer | None, preceding: Sequence[int]
) -> dict[str, Any]:
    """The ``logprobs`` of a chat's choice: for each token its entry, and in ``top_logprobs`` the likeliest k."""
    firsts = _firsts([position[0].token_id for position in positions], tokenizer, preceding)
    content = []
    for position, first in zip(positions, firsts, strict=True):
        top = [_entry(item, tokenizer, first) for item in position[1:]]
        content.append({**_entry(position[0], tokenizer, first), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _firsts(ids: Sequence[int], tokenizer: Tokenizer | None, preceding: Sequence[int]) -> list[bool]:
    """Whether each token would be the first of a text: no token that shows stands before it."""
    is_first = tokenizer is not None and all(tokenizer.decodable_token(token_id) is None for token_id in preceding)
    firsts = []
    for token_id in ids:
        firsts.append(is_first)
        is_first = is_first and tokenizer is not None and tokenizer.decodable_token(token_id) is None
    return firsts


def _native_entry(position: list[TokenLogprob], tokenizer: Tokenizer | None, is_first: bool) -> dict[str, Any]:
    return {
        str(item.token_id): {
            "logprob": finite(item.logprob),
            "rank": item.rank,
            "decoded_token": "" if tokenizer is None else tokenizer.token_text(item.token_id, is_first=is_first),
        }
        for item in position
    }


def _entry(item: TokenLogprob, tokenizer: Tokenizer | None, is_first: bool) -> dict[str, Any]:
    data = b"" if tokenizer is None else tokenizer.token_bytes(item.token_id, is_first=is_first)
    return {"token": _text(item, tokenizer, is_first), "logprob": finite(item.logprob), "bytes": list(data)}


def _text(item: TokenLogprob, tokenizer: Tokenizer | None, is_first: bool) -> str:
    # Without a tokenizer the id stands for the token, so that no two candidates look the same.
    if tokenizer is None:
        return f"token_id:{item.token_id}"
    return tokenizer.token_text(item.token_id, is_first=is_first)
