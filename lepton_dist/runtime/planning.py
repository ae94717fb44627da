"""An input of `generate` as lengths, which is what plans are made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lepton_dist.coordinator.workload import RequestLengths
from lepton_dist.runtime.requests import Prepared, RequestMaker, checkpoint_sampling
from lepton_dist.text.dialects import count_rows, is_text_path, open_input, read_rows
from lepton_dist.text.tokenizer import Tokenizer

_SHOWN_BAD_ROWS = 3
# Rows of an input that are tokenised for a plan: of a longer one, every so manyth stands for those around it.
_MOST_ROWS = 8192


@dataclass(frozen=True)
class InputLengths:
    """The requests of an input as lengths, and notes for the user."""

    requests: list[RequestLengths]
    notes: list[str]


def read_lengths(
    path: str,
    model: str,
    sampling: Mapping[str, Any],
    *,
    vocab: int,
    context_tokens: int,
    output_tokens: int | None = None,
) -> InputLengths:
    """The input of `generate`, each output at its row's hint, at `output_tokens`, or at its `max_tokens`.

    `sampling` are the run's defaults, `context_tokens` the most tokens of prompt and output together.

    Raises:
        UsageError: the input or the tokenizer cannot be read.
    """
    has_tokenizer = (Path(model) / "tokenizer.json").is_file()
    maker = RequestMaker(
        Tokenizer.load(model) if has_tokenizer else None,
        sampling,
        checkpoint_sampling(model),
        vocab=vocab,
        context_tokens=context_tokens,
        base_seed=0,
    )
    every = max(1, -(-count_rows(path) // _MOST_ROWS))
    requests: list[RequestLengths] = []
    bad: list[str] = []
    num_guessed = 0
    with open_input(path) as lines:
        for row in islice(read_rows(lines, is_text=is_text_path(path)), 0, None, every):
            item = maker.prepare(row)
            if not isinstance(item, Prepared):
                bad.append(f"line {item.line}: {item.message}")
                continue
            most = item.request.sampling.max_tokens
            expected = item.request.hint or output_tokens
            num_guessed += expected is None
            lengths = RequestLengths(len(item.request.prompt), min(most, expected or most), most)
            requests += [lengths] * (item.request.sampling.n * every)
    notes = []
    if every > 1:
        notes.append(f"every {every}th row of the input was looked at")
    if bad:
        notes.append(f"{len(bad)} bad row(s) left out: {'; '.join(bad[:_SHOWN_BAD_ROWS])}")
    if num_guessed:
        notes.append(
            f"{num_guessed} output(s) are priced at max_tokens, their bound: rows may have a `hint` of what to "
            "expect, and `lepton-dist plan` takes --output-tokens N"
        )
    return InputLengths(requests, notes)
