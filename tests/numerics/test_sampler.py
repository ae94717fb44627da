"""The sampler on vocabulary shards against a dense one in float64, and against the distribution it should draw from."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from lepton_dist.comm.world import run_local
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import SampleRows, make_batch
from lepton_dist.engine.device_penalties import DevicePenalties
from lepton_dist.engine.penalties import Penalties, open_penalties
from lepton_dist.engine.request import Request, Sequence
from lepton_dist.engine.sampler import Filters, VocabShard, _threshold, sample, score
from lepton_dist.engine.scheduler import Chunk
from lepton_dist.plan.axes import split
from lepton_dist.text.completion import TokenLogprob
from tests.mpi.equality.cases import SAMPLINGS
from tests.mpi.equality.reference import NEAR_TIE, filtered, penalised, perturbed_scores, softmax

VOCAB = 331
SHARES: Mapping[str, tuple[int, ...]] = {"1": (1,), "2": (1, 1), "3": (5, 1, 2), "4": (1, 1, 1, 1)}


@dataclass(frozen=True)
class Row:
    """One row to sample: its parameters and the tokens before it."""

    sampling: SamplingParams
    tokens: list[int]
    prompt_length: int
    sample: int = 0


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


def sample_rows(rows: list[Row], begins: Container[int] | None = None) -> SampleRows:
    """The rows as they travel in a batch; the slots of all, or of those that are named, begin with it."""
    chunks = []
    for index, row in enumerate(rows):
        request = Request(str(index), row.tokens[: row.prompt_length], row.sampling)
        sequence = Sequence(request, row.sample, index)
        sequence.tokens.extend(row.tokens[row.prompt_length :])
        sequence.slot = index if row.sampling.has_penalties else -1
        chunks.append(Chunk(sequence, len(row.tokens) - 1, 1, True, False))
    slotted = [chunk.sequence for chunk in chunks if chunk.sequence.slot >= 0]
    return make_batch(0, chunks, [one for one in slotted if begins is None or one.slot in begins]).samples


def penalties(shard: VocabShard, *, for_device: bool = False) -> Penalties:
    if for_device:
        return DevicePenalties(shard.first, shard.size, torch.device("cpu"))
    return open_penalties(shard.first, shard.size, torch.device("cpu"))


def on_shards(shares: tuple[int, ...], run: Callable[[VocabShard], Any]) -> Any:
    """`run` on a thread for each share of the vocabulary; the same result from all, which is returned."""
    spans = split(VOCAB, shares)

    def body(world: Any) -> Any:
        span = spans[world.rank]
        group = world.group(range(world.size), "vocabulary")
        return run(VocabShard(span.start, span.size, VOCAB, group))

    results = run_local(len(shares), body)
    assert all(result == results[0] for result in results)
    return results[0]


def draw(logits: torch.Tensor, rows: list[Row], shares: tuple[int, ...]) -> list[int]:
    packed = sample_rows(rows)

    def run(shard: VocabShard) -> list[int]:
        mine = logits[:, shard.first : shard.first + shard.size].clone()
        ids: list[int] = sample(mine, packed, shard, penalties(shard)).tolist()
        assert min(ids) >= 0
        return ids

    return list(on_shards(shares, run))


@pytest.mark.parametrize("shares", [(1,), (5, 1, 2)], ids=str)
def test_a_history_that_grows_where_tokens_are_drawn_is_the_one_that_is_sent(shares: tuple[int, ...]) -> None:
    """Over pages and back: slots of short and long histories, begun in different steps, one of them begun again."""
    generator = torch.Generator().manual_seed(11)
    fields = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "temperature": 0.0}
    rows = [
        Row(params(**fields), torch.randint(VOCAB, (size,), generator=generator).tolist(), size)
        for size in (1, 250, 255, 256, 700)
    ]
    plain = Row(params(temperature=0.0), [3], 1)
    values = torch.randn(30, len(rows) + 1, VOCAB, generator=generator)
    values[:, :, 40:] -= 4  # few tokens, so that they come again

    def run(shard: VocabShard) -> list[list[int]]:
        held, on_device, drawn = penalties(shard), penalties(shard, for_device=True), []
        grown = [replace(row, tokens=list(row.tokens)) for row in rows]
        for step, logits in enumerate(values):
            begins = [index for index in range(len(rows)) if index == step or (step, index) == (20, 1)]
            chosen = [*grown[: step + 1], plain]
            packed, mine = sample_rows(chosen, begins), logits[: len(chosen), shard.first : shard.first + shard.size]
            fresh = sample(mine.clone(), sample_rows(chosen), shard, penalties(shard)).tolist()
            ids = sample(mine.clone(), packed, shard, held).tolist()
            assert ids == fresh
            assert ids == sample(mine.clone(), packed, shard, on_device).tolist()
            for row, token in zip(grown, ids, strict=False):
                row.tokens.append(token)
            drawn.append(ids)
        return drawn

    assert on_shards(shares, run) == on_shards((1,), run)


def random_rows(count: int) -> tuple[torch.Tensor, list[Row]]:
    """Logits float32 [count, vocab] of a plausible spread, and rows with every kind of sampling."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(count, VOCAB, generator=generator) * 3
    rows = []
    for index in range(count):
        fields = SAMPLINGS[index % len(SAMPLINGS)]
        tokens = torch.randint(VOCAB, (6 + index % 9,), generator=generator).tolist()
        tokens += tokens[-2:]  # some more than once, so that frequencies count
        rows.append(Row(params(seed=index - 50, **fields), tokens, 3 + index % 3, index % 2))
    return logits, rows


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_the_same_tokens_as_a_dense_sampler(shares: tuple[int, ...]) -> None:
    logits, rows = random_rows(160)
    found = draw(logits, rows, shares)
    num_near_ties = 0
    for values, row, token in zip(logits, rows, found, strict=True):
        scores = perturbed_scores(values.double().numpy(), row.sampling, row.sample, row.tokens, row.prompt_length)
        second, best = np.sort(scores)[-2:]
        num_near_ties += bool(best - second < NEAR_TIE)
        # Within a near tie either is right; elsewhere only the best.
        assert scores[token] > best - NEAR_TIE, (row.sampling, token, int(scores.argmax()))
    assert num_near_ties <= 2


@pytest.mark.parametrize("shares", [(1,), (5, 1, 2)], ids=str)
def test_exactly_the_right_tokens_may_be_chosen(shares: tuple[int, ...]) -> None:
    """The filters' one threshold, against sorting: not a token more, nor one less.

    The last token within top_p lies wherever it lies; a threshold that is rounded once too often cuts it off.
    """
    generator = torch.Generator().manual_seed(23)
    count = 400
    scaled = torch.randn(count, VOCAB, generator=generator) * 2 + 3
    top_p = 0.3 + 0.69 * torch.rand(count, generator=generator)
    top_k = torch.randint(0, 60, (count,), generator=generator)
    min_p = torch.rand(count, generator=generator) * 0.05 * (torch.arange(count) % 2)

    def run(shard: VocabShard) -> list[float]:
        mine = scaled[:, shard.first : shard.first + shard.size]
        return _threshold(mine, Filters(min_p.numpy(), top_k.numpy(), top_p.numpy()), shard).tolist()

    thresholds = torch.tensor(on_shards(shares, run))
    for row in range(count):
        fields = {"top_p": float(top_p[row]), "top_k": int(top_k[row]), "min_p": float(min_p[row])}
        expected = np.isfinite(filtered(scaled[row].double().numpy(), params(**fields)))
        # No cumulated probability here comes nearer to its top_p than 6e-5, so sorting has no doubts of its own.
        assert np.array_equal((scaled[row] >= thresholds[row]).numpy(), expected), (row, fields)


@pytest.mark.parametrize("fields", [f for f in SAMPLINGS if f["temperature"] > 0], ids=str)
def test_frequencies_follow_the_distribution(fields: Mapping[str, float]) -> None:
    """Chi-square over 4,000 draws with different seeds, against the filtered softmax."""
    draws = 4000
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, VOCAB, generator=generator) * 2.5
    tokens = [5, 9, 9, 30, int(logits.argmax())]
    rows = [Row(params(seed=seed, **fields), tokens, 2) for seed in range(draws)]
    found = np.bincount(draw(logits.expand(draws, -1), rows, (2, 1)), minlength=VOCAB)
    scores = penalised(logits[0].double().numpy(), rows[0].sampling, tokens, 2)
    expected = softmax(filtered(scores / rows[0].sampling.temperature, rows[0].sampling)) * draws
    assert not found[expected == 0].any(), "a filtered token was drawn"
    rare = expected < 5  # lumped together, as the chi-square approximation asks
    cells = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(found[~rare], found[rare].sum())
    filled = cells > 0
    statistic = float((((counts - cells) ** 2)[filled] / cells[filled]).sum())
    freedom = int(filled.sum()) - 1
    # Mean `freedom`, standard deviation sqrt(2 freedom): 4.5 of them is below one chance in 10,000; seeds are fixed.
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom) + 1e-9, (statistic, freedom)


def test_samples_of_one_request_are_independent() -> None:
    """Two samples of a request agree about as often as two independent draws: sum of squares of the distribution."""
    draws = 3000
    logits = torch.linspace(0, 3, VOCAB).expand(draws, -1)
    rows = [[Row(params(seed=seed), [1], 1, index) for seed in range(draws)] for index in (0, 1)]
    first, second = (np.array(draw(logits, half, (1,))) for half in rows)
    chance = float((softmax(logits[0].double().numpy()) ** 2).sum())
    agreed = float((first == second).mean())
    assert abs(agreed - chance) < 5 * math.sqrt(chance / draws)


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_logprobs_and_ranks(shares: tuple[int, ...]) -> None:
    logits = torch.randn(24, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    chosen = torch.arange(24) * 13
    wanted = [index % 21 for index in range(24)]

    def run(shard: VocabShard) -> list[list[TokenLogprob]]:
        return score(logits[:, shard.first : shard.first + shard.size], chosen, wanted, shard)

    entries = on_shards(shares, run)
    for row, (values, count) in enumerate(zip(logits.double().numpy(), wanted, strict=True)):
        exact = np.log(softmax(values))
        order = np.argsort(-values, kind="stable")
        assert [entry.token_id for entry in entries[row]] == [int(chosen[row]), *order[:count].tolist()]
        ranks = [int((values > values[chosen[row]]).sum()) + 1, *range(1, count + 1)]
        assert [entry.rank for entry in entries[row]] == ranks
        for entry in entries[row]:
            # The logits are float32 and exact here; only the shift by the largest is rounded, at most 1e-6 of 16.
            assert abs(entry.logprob - exact[entry.token_id]) < 4e-6


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_ties_go_to_the_lowest_id(shares: tuple[int, ...]) -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [70, 200, 330]] = 1.0
    rows = [Row(params(temperature=0.0), [1], 1)] * 2
    assert draw(logits, rows, shares) == [70, 0]


def test_extreme_settings() -> None:
    """What is in range must work: the coldest temperature, a top_k beyond the vocabulary, the smallest top_p."""
    logits, _ = random_rows(1)
    best = int(logits[0].argmax())
    for fields in (
        {"temperature": 1e-45},
        {"temperature": 1e-9, "top_p": 0.5, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 1e-12},
        {"temperature": 2.0, "min_p": 1.0},
        {"temperature": 2.0, "top_k": 1},
    ):
        assert draw(logits, [Row(params(seed=5, **fields), [1], 1)], (2, 1)) == [best], fields
    everything = draw(logits, [Row(params(seed=5), [1], 1)], (2, 1))
    assert draw(logits, [Row(params(seed=5, top_k=2**31 - 1), [1], 1)], (2, 1)) == everything


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_a_row_without_numbers_gets_no_token_and_the_others_theirs(fields: Mapping[str, float]) -> None:
    torch.manual_seed(3)
    sound = torch.randn(4, VOCAB)
    logits = sound.clone()
    logits[0, 300] = math.nan
    logits[1, 5] = math.inf
    logits[2] = -math.inf
    logits[3, 7] = -math.inf  # a token that cannot be drawn is none of it
    row = Row(params(**{"temperature": 1.0, "seed": 1, **fields}), [1], 1)

    def run(shard: VocabShard) -> tuple[list[int], list[list[TokenLogprob]]]:
        mine = logits[:, shard.first : shard.first + shard.size].clone()
        scores = score(mine, torch.tensor([1, 2, 3, 4]), [1] * 4, shard)
        return sample(mine, sample_rows([row] * 4), shard, penalties(shard)).tolist(), scores

    for shares in ((1,), (1, 1)):
        ids, scores = on_shards(shares, run)
        assert ids[:3] == [-1, -1, -1]
        assert ids[3] == draw(logits[3:], [row], (1,))[0]
        assert [len(entries) for entries in scores] == [0, 0, 0, 2]
