"""Histories of tokens on a GPU, for penalties: no step waits for what it has drawn, nor launches a kernel a row.

See `penalties.py`. Runs on any device; on CPUs the other one is faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.engine.batch import Int32, SampleRows, read_admitted, read_slots
from lepton_dist.kernels.upload import upload

_PAGE = 256  # entries
_NONE = -1  # the token of an entry that is not used


class DevicePenalties:
    """`Penalties` in the memory of `device`.

    Histories lie in pages of entries: a token, and how often the output holds it (float32, exact up to 2^24). Entries
    of one token hold the same count. The first entry of a slot is for the token `first`, with -1 where the history
    lacks it: tokens of other shards, and unused entries, are taken for it, so that each entry has a place to write to.
    """

    def __init__(self, first: int, size: int, device: torch.device) -> None:
        self._first, self._size, self._device = first, size, device
        self._tokens = torch.empty((0, _PAGE), dtype=torch.int64, device=device)
        self._counts = torch.empty((0, _PAGE), dtype=torch.float32, device=device)
        self._free: list[int] = []
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def _admit(self, rows: SampleRows) -> None:
        for slot, prompt, output in read_admitted(rows):
            self._free += self._pages.pop(slot, [])
            tokens = np.concatenate([np.array([self._first]), prompt, output])
            written, times = np.unique(output, return_counts=True)
            counts = np.zeros(len(tokens), dtype=np.float32)
            if written.size:
                at = np.searchsorted(written, tokens).clip(max=len(written) - 1)
                counts = np.where(written[at] == tokens, times[at], 0).astype(np.float32)
            if not (tokens[1:] == self._first).any():
                counts[0] = -1
            num_pages = -(-len(tokens) // _PAGE)
            pages = self._pages[slot] = [self._take_page() for _ in range(num_pages)]
            self._lengths[slot] = len(tokens)
            index = upload(np.array(pages), self._device)
            unused = num_pages * _PAGE - len(tokens)
            self._tokens[index] = self._paged(np.pad(tokens, (0, unused), constant_values=_NONE))
            self._counts[index] = self._paged(np.pad(counts, (0, unused)))

    def begin(self, logits: torch.Tensor, rows: SampleRows) -> Callable[[torch.Tensor], None] | None:
        """See `Penalties`."""
        self._admit(rows)
        slots, settings = read_slots(rows)
        chosen = np.flatnonzero(slots >= 0)
        if not chosen.size:
            return None
        penalised = self._of_rows(chosen, slots, settings)
        self._apply(logits, penalised)
        return partial(self._record, penalised)

    def _of_rows(self, rows: NDArray[np.int64], slots: Int32, settings: NDArray[np.float32]) -> DeviceRows:
        chosen = slots[rows].tolist()
        pages = [self._pages[slot] for slot in chosen]
        owner = np.repeat(np.arange(len(rows)), [len(own) for own in pages])
        device = self._device
        return DeviceRows(
            chosen,
            upload(rows, device),
            upload(settings[rows], device),
            upload(owner, device),
            upload(np.fromiter(itertools.chain.from_iterable(pages), dtype=np.int64), device),
            upload(np.array([own[0] for own in pages]), device),
        )

    def _apply(self, logits: torch.Tensor, of: DeviceRows) -> None:
        local = self._tokens[of.pages] - self._first
        counts = self._counts[of.pages]
        is_elsewhere = (local < 0) | (local >= self._size)
        local.masked_fill_(is_elsewhere, 0)
        counts = torch.where(is_elsewhere, self._counts[of.first_pages, 0][of.owner].unsqueeze(1), counts)
        flat = logits.view(-1)
        place = local.add_((of.rows * self._size)[of.owner].unsqueeze(1)).view(-1)
        values = flat[place].view_as(counts)
        repetition, presence, frequency = of.settings[of.owner].unsqueeze(2).unbind(1)
        penalised = torch.where(values > 0, values / repetition, values * repetition)
        penalised -= torch.where(counts > 0, presence + frequency * counts, 0)
        flat[place] = torch.where(counts < 0, values, penalised).view(-1)

    def _record(self, of: DeviceRows, drawn: torch.Tensor) -> None:
        new = drawn[of.rows]
        counts = self._counts[of.pages]
        is_same = self._tokens[of.pages] == new[of.owner].unsqueeze(1)
        counts = torch.where(is_same, counts.clamp(min=0) + 1, counts)
        self._counts[of.pages] = counts
        largest = (counts * is_same).amax(dim=1)
        times = torch.ones(len(of.slots), device=self._device).scatter_reduce_(0, of.owner, largest, "amax")
        pages, places = zip(*(self._next_place(slot) for slot in of.slots), strict=True)
        where = upload(np.array(pages), self._device), upload(np.array(places), self._device)
        self._tokens[where], self._counts[where] = new, times

    def _next_place(self, slot: int) -> tuple[int, int]:
        """The page and the place in it of a slot's next entry."""
        place = self._lengths[slot]
        self._lengths[slot] += 1
        pages = self._pages[slot]
        if place == len(pages) * _PAGE:
            page = self._take_page()
            self._tokens[page] = _NONE
            self._counts[page] = 0
            pages.append(page)
        return pages[place // _PAGE], place % _PAGE

    def _take_page(self) -> int:
        if not self._free:
            held = len(self._tokens)
            more = max(held, 64)
            self._tokens = torch.cat([self._tokens, self._tokens.new_empty((more, _PAGE))])
            self._counts = torch.cat([self._counts, self._counts.new_empty((more, _PAGE))])
            self._free = list(range(held + more - 1, held - 1, -1))
        return self._free.pop()

    def _paged(self, values: NDArray[np.generic]) -> torch.Tensor:
        return upload(values.reshape(-1, _PAGE), self._device)


@dataclass(frozen=True)
class DeviceRows:
    """Rows of a batch with penalties, q of them.

    Their `slots`; where the logits are: rows int64 [q], settings float32 [q, 3], owner int64 [pages] the row of each of
    their pages, pages int64 [pages], first_pages int64 [q].
    """

    slots: Sequence[int]
    rows: torch.Tensor
    settings: torch.Tensor
    owner: torch.Tensor
    pages: torch.Tensor
    first_pages: torch.Tensor
