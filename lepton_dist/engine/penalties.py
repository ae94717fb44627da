"""Repetition, presence and frequency penalties on a vocabulary shard, kept where tokens are drawn.

A sequence with penalties has a slot. Its history comes once, with the step in which it is first sampled; from then on
each token that is drawn for it is added here. The repetition penalty (arXiv:1909.05858) is on every token of prompt and
output, the presence and frequency penalties (OpenAI) are on the output's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.engine.batch import Int32, SampleRows, read_admitted, read_slots
from lepton_dist.engine.device_penalties import DevicePenalties


class Penalties(Protocol):
    """The histories of slots, for one shard of the vocabulary."""

    def begin(self, logits: torch.Tensor, rows: SampleRows) -> Record | None:
        """Change the rows of logits float32 [r, vocab/tp] that have a slot, in place; None where none has.

        Slots that begin with this step are taken in first; what they held before is forgotten. Call what is returned
        with the drawn ids int64 [r].
        """
        ...


class Record(Protocol):
    """Adds the token ids that were drawn for a batch to the histories of its rows."""

    def __call__(self, drawn: torch.Tensor) -> None:
        """drawn int64 [r]."""
        ...


def open_penalties(first: int, size: int, device: torch.device) -> Penalties:
    """For the rows [first, first + size) of the vocabulary, where logits are on `device`."""
    return HostPenalties(first, size) if device.type == "cpu" else DevicePenalties(first, size, device)


class _History:
    """The distinct tokens of a sequence that a shard holds, and what is taken off their logits for the output."""

    def __init__(self, prompt: list[int], output: list[int], settings: Sequence[float]) -> None:
        self._repetition, self._presence, self._frequency = settings
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        size = len(self._place)
        self._counts = [0] * size
        self._tokens: NDArray[np.int64] = np.zeros(size + 64, dtype=np.int64)
        self._taken_off: NDArray[np.float32] = np.zeros(size + 64, dtype=np.float32)
        self._tokens[:size] = list(self._place)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """The output has a token more."""
        place = self._place.setdefault(token, len(self._counts))
        if place == len(self._counts):
            self._counts.append(0)
            if place == len(self._tokens):
                self._tokens = np.resize(self._tokens, 2 * place)
                self._taken_off = np.resize(self._taken_off, 2 * place)
            self._tokens[place] = token
        self._counts[place] += 1
        self._taken_off[place] = np.float32(self._presence) + np.float32(self._frequency) * self._counts[place]

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Change a row of logits [vocab/tp]."""
        size = len(self._counts)
        tokens = self._tokens[:size]
        values = logits[tokens]
        if self._repetition != 1:
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
        if self._presence or self._frequency:
            values -= self._taken_off[:size]
        logits[tokens] = values


class HostPenalties:
    """`Penalties` in this process's memory, for logits on a CPU."""

    def __init__(self, first: int, size: int) -> None:
        self._first, self._size = first, size
        self._histories: dict[int, _History] = {}

    def begin(self, logits: torch.Tensor, rows: SampleRows) -> Record | None:
        """See `Penalties`."""
        slots, settings = read_slots(rows)
        chosen = np.flatnonzero(slots >= 0).tolist()
        if not chosen:
            return None
        of_slot = {int(slots[row]): settings[row].tolist() for row in chosen} if rows.admitted else {}
        for slot, prompt, output in read_admitted(rows):
            self._histories[slot] = _History(self._local(prompt), self._local(output), of_slot[slot])
        values = logits.numpy()
        histories = [(row, self._histories[int(slots[row])]) for row in chosen]
        for row, history in histories:
            history.apply(values[row])

        def record(drawn: torch.Tensor) -> None:
            tokens = drawn.tolist()
            for row, history in histories:
                token = tokens[row] - self._first
                if 0 <= token < self._size:
                    history.add(token)

        return record

    def _local(self, tokens: Int32) -> list[int]:
        """Those of the tokens that this shard holds, as rows of it."""
        local = tokens.astype(np.int64) - self._first
        found: list[int] = local[(local >= 0) & (local < self._size)].tolist()
        return found
