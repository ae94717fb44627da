"""What the engine hands back for a request: tokens, why they ended, and their probabilities; no text yet."""

from __future__ import annotations

import msgspec


class TokenLogprob(msgspec.Struct, frozen=True):
    """One candidate token: natural `logprob`, its `rank` (1 is the likeliest) and its id."""

    logprob: float
    rank: int
    token_id: int


class Completion(msgspec.Struct, kw_only=True):
    """One sample of a request.

    Attributes:
        index: which of the request's n samples, from 0.
        token_ids: the generated ids, with the ending stop token.
        finish_reason: "stop" (an end token, a stop token or a stop string) or "length" (`max_tokens`, or the context).
        stop_reason: the stop string or the stop token's id, when one of the request's own ended it; None for the
            model's end token and for "length".
        cut: where this stop string begins in the text, in characters; None where no stop string ended it.
        logprobs: for each generated token a list: the chosen token first, then the likeliest k (the chosen one is
            repeated there when it is among them); None when they were not asked for.
    """

    index: int
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None = None
    cut: int | None = None
    logprobs: list[list[TokenLogprob]] | None = None

    @property
    def is_ended_by_token(self) -> bool:
        """Whether the last id is an end or stop token, which the text leaves out."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)


class RequestOutput(msgspec.Struct, kw_only=True):
    """All that a finished request gives.

    Attributes:
        prompt_tokens: the length of the prompt in tokens.
        completions: one for each of the n samples, by index.
        preceding: the prompt's last tokens, which decide how the text goes on.
        prompt: the prompt's tokens, where their log-probabilities were asked for.
        prompt_logprobs: for each prompt token a list as in `Completion.logprobs`, None for the first; None when they
            were not asked for.
        failure: why the request gave nothing; empty when it gave its completions.
    """

    prompt_tokens: int
    completions: list[Completion]
    preceding: list[int] = []
    prompt: list[int] | None = None
    prompt_logprobs: list[list[TokenLogprob] | None] | None = None
    failure: str = ""

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, generated tokens of all samples, and both, by OpenAI's names."""
        generated = sum(len(completion.token_ids) for completion in self.completions)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }
