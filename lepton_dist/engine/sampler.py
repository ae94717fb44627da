"""Choosing tokens from logits that are sharded over the vocabulary; no rank ever sees the whole of them.

Filters become one threshold a row on the logits, found by small reductions: min-p first, then top-k, then top-p over
what is left (vLLM's order). The noise is a hash of (request, position, token id), so each rank perturbs its own rows
and the group takes an arg-max: the same seed gives the same token on every plan. Ties go to the lowest token id.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.comm.group import Group
from lepton_dist.engine.batch import SampleRows, read_int32
from lepton_dist.engine.penalties import Penalties
from lepton_dist.kernels.noise import gumbel
from lepton_dist.kernels.row_maxima import row_maxima
from lepton_dist.kernels.upload import upload
from lepton_dist.text.completion import TokenLogprob

_BINS = 1024
_PASSES = 3
_RANGE = 88.0  # e^-88 is nothing beside the largest term, in float32
_COLDEST = 1e-6  # below it the noise is lost beside the logits anyway, and dividing by it would overflow


@dataclass(frozen=True)
class VocabShard:
    """The rows [first, first + size) of `vocab` that this rank holds, and the group that shares the vocabulary."""

    first: int
    size: int
    vocab: int
    group: Group

    @property
    def tokens(self) -> torch.Tensor:
        """The ids of the shard's rows, int32 [size]."""
        return self.tokens_on(torch.device("cpu"))

    def tokens_on(self, device: torch.device) -> torch.Tensor:
        """The same on any device."""
        return torch.arange(self.first, self.first + self.size, dtype=torch.int32, device=device)


def sample(logits: torch.Tensor, rows: SampleRows, shard: VocabShard, penalties: Penalties) -> torch.Tensor:
    """logits float32 [r, vocab/tp], changed in place -> token ids int64 [r], the same on every rank of the group.

    Which rows ask for what is known on the host, so nothing here waits for a GPU. An id is -1 where the logits are not
    numbers. `penalties` hold the histories of this shard's slots, and take in what is drawn.
    """
    device = logits.device
    settings = np.frombuffer(rows.settings, dtype=np.float32).reshape(-1, 6)
    counts = read_int32(rows.counts, 3)
    record = penalties.begin(logits, rows)
    noisy = np.flatnonzero(settings[:, 0] > 0)
    if noisy.size:
        picked = upload(noisy, device)
        keys = upload(read_int32(rows.keys, 2)[noisy], device)
        temperature = upload(np.maximum(settings[noisy, 0], np.float32(_COLDEST)), device)
        scaled = logits[picked] / temperature[:, None]
        filters = Filters(settings[noisy, 2], counts[noisy, 0].astype(np.int64), settings[noisy, 1])
        threshold = _threshold(scaled, filters, shard)
        scores = scaled + gumbel(keys, shard.tokens_on(device))
        logits[picked] = scores.masked_fill_(scaled < threshold.unsqueeze(1), -math.inf)
    drawn = arg_max(logits, shard)
    if record is not None:
        record(drawn)
    return drawn


def arg_max(scores: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """float32 [r, vocab/tp] -> ids int64 [r] of the largest score over the whole vocabulary, the lowest id at a tie.

    -1 where there is nothing to choose by: a score is NaN, or the largest is infinite.
    """
    values, local = row_maxima(scores)
    if shard.group.size == 1:
        return (local + shard.first).masked_fill_(~values.isfinite(), -1)
    # [tp, r, 2]: float64 holds both the score and the id exactly.
    best = shard.group.all_gather(torch.stack((values.double(), (local + shard.first).double()), dim=1))
    owner = best[:, :, 0].argmax(dim=0, keepdim=True)
    ids = best[:, :, 1].gather(0, owner)[0].long()
    return ids.masked_fill_(~best[:, :, 0].amax(dim=0).isfinite(), -1)


@dataclass(frozen=True)
class Filters:
    """What rows cut off, on the host: min_p float32 [r], top_k int64 [r], top_p float32 [r]."""

    min_p: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]


def _threshold(scaled: torch.Tensor, filters: Filters, shard: VocabShard) -> torch.Tensor:
    """The lowest scaled logit that each row may choose, float32 [r]."""
    group, device = shard.group, scaled.device
    largest = group.all_reduce(scaled.amax(dim=1), op="max")
    min_p = upload(filters.min_p, device)
    threshold = largest + torch.where(min_p > 0, min_p.log(), -math.inf)
    limited = np.flatnonzero((filters.top_k > 0) & (filters.top_k < shard.vocab))
    if limited.size:
        picked = upload(limited, device)
        kth = _kth_largest(scaled[picked], filters.top_k[limited], group)
        threshold[picked] = torch.maximum(threshold[picked], kth)
    limited = np.flatnonzero(filters.top_p < 1)
    if limited.size:
        picked = upload(limited, device)
        top_p = upload(filters.top_p[limited], device)
        threshold[picked] = _mass_threshold(scaled[picked], largest[picked], threshold[picked], top_p, group)
    return threshold


def _kth_largest(scaled: torch.Tensor, top_k: NDArray[np.int64], group: Group) -> torch.Tensor:
    """The k-th largest value of each row over the whole vocabulary, which has more than k."""
    most = int(top_k.max())
    count = min(most, scaled.shape[1])
    mine = torch.full((scaled.shape[0], most), -math.inf, device=scaled.device)
    mine[:, :count] = scaled.topk(count, dim=1).values
    # [tp, r, k] -> [r, tp * k]
    merged = group.all_gather(mine).transpose(0, 1).reshape(scaled.shape[0], -1)
    place = upload(top_k - 1, scaled.device)
    return merged.topk(most, dim=1).values.gather(1, place.unsqueeze(1)).squeeze(1)


def _mass_threshold(
    scaled: torch.Tensor, largest: torch.Tensor, floor: torch.Tensor, top_p: torch.Tensor, group: Group
) -> torch.Tensor:
    """The value from which on a row's probabilities (of what is at least `floor`) add up to top_p.

    A histogram of probability by distance from the largest logit, refined three times: 1024^3 steps.
    """
    # float64 before the difference: rounded in float32, it could put the last token that fits beyond the edge.
    distance = largest.double().unsqueeze(1) - scaled.double()
    mass = torch.exp(-distance).masked_fill_(scaled < floor.unsqueeze(1), 0.0)
    start = torch.zeros(len(largest), 1, dtype=torch.float64, device=scaled.device)
    width = torch.full_like(start, _RANGE / _BINS)
    above = torch.zeros_like(start)
    target: torch.Tensor | None = None
    for _ in range(_PASSES):
        place = ((distance - start) / width).floor_()
        is_inside = (place >= 0) & (place < _BINS)
        bins = torch.zeros(len(largest), _BINS, dtype=torch.float64, device=scaled.device)
        # NaNs fall anywhere: `arg_max` reports them.
        bins.scatter_add_(1, place.clamp_(0, _BINS - 1).nan_to_num_().long(), mass * is_inside)
        bins = group.all_reduce(bins)
        reached = above + bins.cumsum(dim=1)
        if target is None:
            target = top_p.double().unsqueeze(1) * reached[:, -1:] * (1 - 1e-12)
        chosen = (reached < target).sum(dim=1, keepdim=True).clamp_(max=_BINS - 1)
        above = reached.gather(1, chosen) - bins.gather(1, chosen)
        start = start + chosen * width
        width = width / _BINS
    edge = start + width * _BINS
    return torch.maximum(floor, (largest.double().unsqueeze(1) - edge).squeeze(1).float())


def score(
    logits: torch.Tensor, chosen: torch.Tensor, num_likeliest: list[int], shard: VocabShard
) -> list[list[TokenLogprob]]:
    """Log-probabilities of the `chosen` ids and of each row's likeliest tokens.

    logits float32 [r, vocab/tp], raw; chosen int64 [r]; `num_likeliest` says how many for each row. It waits for a GPU.
    A row whose logits are not numbers gets an empty list.
    """
    group = shard.group
    largest = group.all_reduce(logits.amax(dim=1), op="max")
    total = group.all_reduce((logits - largest.unsqueeze(1)).double().exp().sum(dim=1))
    normaliser = largest.double() + total.log()
    local = chosen - shard.first
    is_mine = (local >= 0) & (local < shard.size)
    value = logits.gather(1, local.clamp(0, shard.size - 1).unsqueeze(1)).squeeze(1)
    value = group.all_reduce(value.masked_fill(~is_mine, -math.inf), op="max")
    ranks = group.all_reduce((logits > value.unsqueeze(1)).sum(dim=1)) + 1
    most = min(max(num_likeliest, default=0), shard.vocab)
    count = min(most, shard.size)
    best = torch.full((len(chosen), most, 2), -math.inf, dtype=torch.float64, device=logits.device)
    values, ids = logits.topk(count, dim=1)
    best[:, :count, 0], best[:, :count, 1] = values.double(), (ids + shard.first).double()
    # [tp, r, k, 2] -> [r, tp * k, 2]
    merged = group.all_gather(best).transpose(0, 1).reshape(len(chosen), -1, 2)
    order = merged[:, :, 0].sort(dim=1, descending=True, stable=True).indices[:, :most]
    top_values, top_ids = merged[:, :, 0].gather(1, order).cpu(), merged[:, :, 1].gather(1, order).cpu()
    normaliser, value, ranks, chosen = normaliser.cpu(), value.cpu(), ranks.cpu(), chosen.cpu()
    rows: list[list[TokenLogprob]] = []
    for r, wanted in enumerate(num_likeliest):
        z = float(normaliser[r])
        if not math.isfinite(z):
            rows.append([])
            continue
        entries = [TokenLogprob(float(value[r]) - z, int(ranks[r]), int(chosen[r]))]
        entries += [
            TokenLogprob(float(top_values[r, k]) - z, k + 1, int(top_ids[r, k])) for k in range(min(wanted, most))
        ]
        rows.append(entries)
    return rows
