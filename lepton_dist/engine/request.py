"""A request as the engine sees it (token ids only), and the sequences that it becomes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from lepton_dist.config.sampling import SamplingParams
from lepton_dist.text.completion import TokenLogprob


class Request(msgspec.Struct, frozen=True):
    """One prompt. `key` is unique in the run; `sampling` has a seed, and a `max_tokens` that fits the context.

    `hint` is how many tokens of output its sender expects; the balancer's length predictor looks at it. The last
    `num_preceding` tokens of the prompt decide how its text goes on.
    """

    key: str
    prompt: list[int]
    sampling: SamplingParams
    hint: int | None = None
    num_preceding: int = 0

    @property
    def preceding(self) -> list[int]:
        """The last tokens of the prompt, which decide how its text goes on."""
        return self.prompt[len(self.prompt) - self.num_preceding :]


class Scanner(Protocol):
    """Looks for stop strings in the text of the tokens pushed so far.

    `found` is the first that is complete, `cut` the length of the text before it, in characters.
    """

    found: str | None
    cut: int

    def push(self, token_id: int) -> bool:
        """Whether a stop string is complete with this token."""
        ...


def _no_blocks() -> array[int]:
    return array("i")


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request on its way through the engine.

    `tokens` are the prompt and what was generated, as far as it is known here; `num_pending` more are being drawn by
    steps in flight, the last of them as row `last_row` of its step. The first `num_computed` of them all have (or, in
    flight, will have) their keys and values in the cache, in the blocks of `block_table`, int32; `num_published` of
    those are offered for reuse. It `is_running` while it holds blocks; `last_batch` is the last batch that it is in.

    `slot` is where the last stage keeps the history that penalties look at, -1 before it has one; `make_batch` keeps
    `settings`.

    A secluded sequence neither takes over blocks that others have computed nor offers its own; in one that is unscored,
    a position of the prompt had logits that are not numbers.
    """

    request: Request
    sample: int
    arrival: int
    is_long: bool = False
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    block_table: array[int] = field(default_factory=_no_blocks)
    block_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_pending: int = 0
    last_row: int = 0
    slot: int = -1
    settings: bytes = b""
    is_penalised: bool = False
    scanner: Scanner | None = None
    is_running: bool = False
    last_batch: int = -1
    is_done: bool = False
    is_secluded: bool = False
    is_unscored: bool = False
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.is_penalised = self.request.sampling.has_penalties

    def secluded(self) -> Sequence:
        """The same sequence with nothing computed, to be computed anew from its tokens and from nobody's blocks."""
        again = Sequence(
            self.request, self.sample, self.arrival, self.is_long, is_secluded=True, logprobs=self.logprobs
        )
        again.tokens = list(self.tokens)
        return again

    @property
    def is_fresh(self) -> bool:
        """Whether it has not begun: nothing was drawn for it, in no earlier try either."""
        return len(self.tokens) == len(self.request.prompt) and not self.is_secluded

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def num_uncomputed(self) -> int:
        """Tokens, known or pending, whose keys and values are not in the cache yet."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def can_run_ahead(self) -> bool:
        """Whether its next step may be ordered before the token that it begins with is known here.

        Not where that token is the last one for certain.
        """
        drawn = len(self.tokens) + self.num_pending - self.prompt_length
        return drawn < self.request.sampling.max_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether positions of the prompt are still to be scored; their logits need every token computed anew."""
        asked = self.request.sampling.prompt_logprobs is not None and self.sample == 0
        return asked and len(self.prompt_logprobs) < self.prompt_length - 1
