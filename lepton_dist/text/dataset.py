"""Prompts as a sequence, for the Python API: a file read whole, or a list of strings."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from lepton_dist.config.sampling import is_encodable, shown_value
from lepton_dist.errors import RequestError
from lepton_dist.text.dialects import is_text_path, open_input, read_rows
from lepton_dist.text.rows import BadRow, PromptRow, key_of_id

_SHOWN_ERRORS = 5


class Dataset(Sequence[PromptRow]):
    """Rows in input order: ``len``, iteration, an index, a slice (which is a `Dataset` too).

    Attributes:
        source: where the rows come from, for messages.
    """

    def __init__(self, rows: Sequence[PromptRow], source: str) -> None:
        self._rows = tuple(rows)
        self.source = source

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PromptRow]:
        return iter(self._rows)

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...

    @overload
    def __getitem__(self, index: slice) -> Dataset: ...

    def __getitem__(self, index: int | slice) -> PromptRow | Dataset:
        if isinstance(index, slice):
            return Dataset(self._rows[index], self.source)
        return self._rows[index]

    def __repr__(self) -> str:
        return f"Dataset({self.source!r}, {len(self)} rows)"


def load_dataset(source: str | os.PathLike[str] | Sequence[str]) -> Dataset:
    """Load prompts: a ``.txt`` file (a prompt a line), a JSON Lines file in any dialect of `generate`, or strings.

    Unlike a batch run, which answers a bad row with an error row, this refuses the whole input: the texts that come
    back stand by position, and a missing one would shift the rest.

    Raises:
        UsageError: the file is absent or cannot be read.
        RequestError: rows are bad, or there are none; names the lines.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source))
    rows = []
    for number, prompt in enumerate(source, start=1):
        if not isinstance(prompt, str) or not prompt:
            problem = "an empty string" if prompt == "" else shown_value(prompt)
            raise RequestError(f"prompt {number} of the list is {problem}; it must be a string with text in it")
        if not is_encodable(prompt):
            raise RequestError(f"prompt {number} of the list holds a lone surrogate; it must be valid Unicode text")
        rows.append(PromptRow(key=key_of_id(number), id=number, line=number, prompt=prompt))
    return Dataset(rows, f"a list of {len(rows)} strings")


def _from_file(path: Path) -> Dataset:
    rows: list[PromptRow] = []
    bad: list[BadRow] = []
    with open_input(path) as lines:
        for row in read_rows(lines, is_text=is_text_path(path)):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                rows.append(row)
    if bad:
        shown = "; ".join(f"{path}:{row.line}: {row.message}" for row in bad[:_SHOWN_ERRORS])
        rest = f"; and {len(bad) - _SHOWN_ERRORS} more" if len(bad) > _SHOWN_ERRORS else ""
        raise RequestError(shown + rest)
    if not rows:
        raise RequestError(f"{path}: holds no rows; give at least one prompt")
    return Dataset(rows, str(path))
