"""From rows to requests: tokenised, checked against the context, with every default filled in."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from lepton_dist.config.sampling import SamplingParams, checkpoint_defaults, request_seed
from lepton_dist.engine.request import Request
from lepton_dist.errors import RequestError
from lepton_dist.model.registry import read_generation_config
from lepton_dist.text.detokenizer import num_preceding
from lepton_dist.text.prompt import prompt_ids
from lepton_dist.text.rows import BadRow, PromptRow
from lepton_dist.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """A row that can be run, and its request."""

    row: PromptRow
    request: Request


Item = Prepared | BadRow


def checkpoint_sampling(model: str) -> dict[str, Any]:
    """The sampling fields of a checkpoint's generation_config.json; none where it has no such file.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    return checkpoint_defaults(read_generation_config(model))


def refused(row: PromptRow, error: RequestError) -> BadRow:
    """The bad row that a row becomes when its request is refused."""
    return BadRow(key=row.key, id=row.id, line=row.line, dialect=row.dialect, kind=error.kind, message=str(error))


class RequestMaker:
    """Turns rows into requests for one model.

    Args:
        options: sampling fields of the command; they go before `checkpoint`'s.
        checkpoint: sampling fields of the checkpoint's generation_config.json.
        context_tokens: the most tokens of prompt and output together.
        today: what chat templates are told that ask for the date (`Tokenizer.tells_date`): the first start of a run
            that can be resumed. None is the hour of each request.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        options: Mapping[str, Any],
        checkpoint: Mapping[str, Any],
        *,
        vocab: int,
        context_tokens: int,
        base_seed: int,
        today: datetime.datetime | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options, self._checkpoint = options, checkpoint
        self._vocab, self._context_tokens, self._base_seed = vocab, context_tokens, base_seed
        self._today = today

    def prepare(self, row: PromptRow | BadRow) -> Item:
        """The row with its request, or the bad row that says why there is none.

        Raises:
            CheckpointError: the row is text, and the model has no tokenizer; or the row needs a sampling default of the
                checkpoint's that is of no use.
        """
        if isinstance(row, BadRow):
            return row
        try:
            return Prepared(row, self.request(row))
        except RequestError as error:
            return refused(row, error)

    def request(self, row: PromptRow) -> Request:
        """The request of a row.

        Raises:
            RequestError: an unknown token id, a value out of range, or a prompt that leaves no room in the context.
            CheckpointError: as `prepare`.
        """
        params = SamplingParams.merged(row.overrides, self._options, self._checkpoint)
        ids = prompt_ids(row, self._tokenizer, self._today, self._context_tokens)
        beyond = next((token for token in ids if not 0 <= token < self._vocab), None)
        if beyond is not None:
            ids_of = (
                "prompt_token_ids holds" if row.prompt_token_ids is not None else "the tokenizer makes of the prompt"
            )
            raise RequestError(f"{ids_of} {beyond}; the model's ids go from 0 to {self._vocab - 1}")
        room = self._context_tokens - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, but the context holds {self._context_tokens}, of which one "
                "at least is for the output: shorten the prompt",
                kind="context_length_exceeded",
            )
        seed = request_seed(self._base_seed, row.id) if params.seed is None else params.seed
        params = msgspec.structs.replace(params, seed=seed, max_tokens=min(params.max_tokens, room))
        preceding = 0 if self._tokenizer is None else num_preceding(self._tokenizer, ids)
        return Request(row.key, ids, params, row.hint, preceding)
