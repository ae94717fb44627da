"""From a row's prompt, whatever its form, to token ids."""

from __future__ import annotations

import datetime

from lepton_dist.errors import CheckpointError, RequestError
from lepton_dist.text.rows import PromptRow
from lepton_dist.text.tokenizer import Tokenizer


def prompt_ids(
    row: PromptRow, tokenizer: Tokenizer | None, today: datetime.datetime | None = None, most: int | None = None
) -> list[int]:
    """The token ids that the model is given for a row; at least one.

    `today` is as in `Tokenizer.render_chat`, `most` as in `Tokenizer.encode`.

    Raises:
        RequestError: the prompt is empty, far too long, cannot be encoded, or is a chat that the model's template
            refuses.
        CheckpointError: the row needs a tokenizer and the model has none.
    """
    if row.prompt_token_ids is not None:
        return row.prompt_token_ids
    if tokenizer is None:
        raise CheckpointError(
            f"line {row.line} holds text, and the model directory has no tokenizer.json; "
            "add it, or give prompt_token_ids"
        )
    if row.messages is not None:
        ids = tokenizer.encode_chat(row.messages, row.tools, today=today, most=most)
    else:
        ids = tokenizer.encode(row.prompt or "", most=most)
    if not ids:
        raise RequestError("the prompt is empty once it is tokenised; give at least one token")
    return ids
