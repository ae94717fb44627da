"""Log-probabilities of tokens in their three shapes: native, OpenAI's for completions and OpenAI's for chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lepton_dist.text.completion import TokenLogprob
from lepton_dist.text.tokenizer import Tokenizer

# JSON has no infinity; OpenAI writes this for a token that could not have been chosen.
_LOWEST_LOGPROB = -9999.0


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; minus infinity and NaN become -9999."""
    return _LOWEST_LOGPROB if math.isnan(logprob) else max(logprob, _LOWEST_LOGPROB)


def native_logprobs(
    positions: Sequence[list[TokenLogprob] | None], tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """One entry a token: ``{token_id: {"logprob", "rank", "decoded_token"}}``; null for a prompt's first token."""
    return [None if position is None else _native_entry(position, tokenizer) for position in positions]


def completion_logprobs(positions: list[list[TokenLogprob]], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ``logprobs`` of a completion's choice: four lists of one entry a token.

    ``text_offset`` counts the characters of the tokens before, as they read one by one.
    """
    offsets, offset = [], 0
    tokens = [_text(position[0], tokenizer) for position in positions]
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(position[0].logprob) for position in positions],
        # Of two tokens with the same text the likelier is kept, which comes first.
        "top_logprobs": [
            {_text(item, tokenizer): finite(item.logprob) for item in reversed(position)} for position in positions
        ],
        "text_offset": offsets,
    }


def chat_logprobs(positions: list[list[TokenLogprob]], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ``logprobs`` of a chat's choice: for each token its entry, and in ``top_logprobs`` the likeliest k."""
    content = [
        {**_entry(position[0], tokenizer), "top_logprobs": [_entry(item, tokenizer) for item in position[1:]]}
        for position in positions
    ]
    return {"content": content, "refusal": None}


def _native_entry(position: list[TokenLogprob], tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        str(item.token_id): {
            "logprob": finite(item.logprob),
            "rank": item.rank,
            "decoded_token": "" if tokenizer is None else tokenizer.token_text(item.token_id),
        }
        for item in position
    }


def _entry(item: TokenLogprob, tokenizer: Tokenizer | None) -> dict[str, Any]:
    data = b"" if tokenizer is None else tokenizer.token_bytes(item.token_id)
    return {"token": _text(item, tokenizer), "logprob": finite(item.logprob), "bytes": list(data)}


def _text(item: TokenLogprob, tokenizer: Tokenizer | None) -> str:
    # Without a tokenizer the id stands for the token, so that no two candidates look the same.
    return f"token_id:{item.token_id}" if tokenizer is None else tokenizer.token_text(item.token_id)
