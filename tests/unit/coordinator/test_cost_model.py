"""The cost model counts what the runtime holds and moves, adds it up as stages do, and learns what it got wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from lepton_dist.coordinator.cluster import Cluster, Link, Matmul, RankProfile
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.stage_cost import TERMS, ModelCost, Terms
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.engine.work import StepWork, chunk_pairs
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.model.registry import read_model
from lepton_dist.parallel.requirements import kv_heads_of, weight_bytes
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.crossing import OVERLAP_ROWS
from lepton_dist.plan.placement import seats
from lepton_dist.plan.plan import Plan, Replica, Stage
from lepton_dist.plan.precision import Dtypes

BF16 = Dtypes("bfloat16", "bfloat16", "bfloat16", "bfloat16")
SHAPE = ModelShape(num_layers=8, hidden=1024, num_heads=16, num_kv_heads=4, head_dim=64, ffn=4096, vocab=32000)
MATMUL = Matmul({"bfloat16": ((1, 1e10), (32, 1e11), (512, 2e11))})
PROFILE = RankProfile(0, "h", 0, "cpu", 1, 8 << 30, 2e10, MATMUL, 1e10, 5e10, 2e-4, 5e-5, 3e-6, 5e-7, 1e-9, 1e-10)
EXAMPLE = Path(__file__).parents[3] / "configs" / "examples" / "tiny-stdlib"
DECODE = StepWork(16, 16, 16, 16 * 300)
PREFILL = StepWork(512, 1, 1, 0, chunk_pairs(0, 512))

works = st.builds(
    StepWork, st.integers(1, 600), st.integers(0, 64), st.integers(1, 64), st.integers(0, 10**5), st.integers(0, 10**6)
)
shares = st.lists(st.integers(1, 4).map(float), min_size=1, max_size=4)


def cluster(*nodes: int) -> Cluster:
    ranks = tuple(replace(PROFILE, rank=rank, node=node, host=f"n{node}") for rank, node in enumerate(nodes))
    return Cluster("c", ranks, Link(1e-6, 1e10), Link(3e-5, 1e9))


def slowed(given_cluster: Cluster, rank: int, by: float) -> Cluster:
    old = given_cluster.ranks[rank]
    curves = {dtype: tuple((x, y / by) for x, y in curve) for dtype, curve in old.matmul.rates.items()}
    new = replace(old, matmul=Matmul(curves), memory_bytes_per_s=old.memory_bytes_per_s / by)
    return replace(given_cluster, ranks=tuple(new if r.rank == rank else r for r in given_cluster.ranks))


def model(plan: Plan, on: Cluster | None = None, dtypes: Dtypes = BF16, **more: bool) -> CostModel:
    on = on or cluster(*[0] * (max(plan.ranks) + 1 if plan.replicas else plan.mesh.size if plan.mesh else 1))
    return CostModel(on, plan.resolve(SHAPE, len(on.ranks)), SHAPE, dtypes, **more)


def staged(*stages: Stage) -> Plan:
    return Plan(replicas=(Replica(stages),))


@settings(max_examples=30, deadline=None)
@given(shares, st.integers(1, 5), st.sampled_from(["float32", "bfloat16", "int8", "int4"]))
def test_bytes_are_those_that_the_runtime_holds(proportions: list[float], first_layers: int, dtype: str) -> None:
    """Two stages with uneven shares: weights as `parallel` loads them, keys and values as `engine` lays them out."""
    config, family = read_model(EXAMPLE)
    shape = config.shape
    count = len(proportions)
    rest = shape.num_layers - first_layers
    front = Stage(tuple(range(count)), first_layers, tuple(proportions))
    plan = staged(front, Stage(tuple(range(count, 2 * count)), rest, tuple(reversed(proportions)))).resolve(
        shape, 2 * count
    )
    compute = "bfloat16" if dtype.startswith("int") else dtype
    dtypes = Dtypes(dtype, "bfloat16", compute, compute)
    cost = ModelCost(shape, dtypes, config.is_gated, config.is_tied)
    table = ParameterTable(config, family)
    for seat in seats(plan, shape).values():
        held = weight_bytes(table, seat, dtypes)
        assert cost.held_bytes(seat) == pytest.approx(held, rel=0.04 if dtype != compute else 1e-9)  # padded rows
        block = KvGeometry(len(seat.layers), kv_heads_of(seat), shape.head_dim, 16, torch.bfloat16).block_bytes
        assert 16 * cost.kv_token_bytes(seat) == block


@settings(max_examples=30, deadline=None)
@given(shares)
def test_the_shares_of_a_stage_make_the_whole(proportions: list[float]) -> None:
    plan = staged(Stage(tuple(range(len(proportions))), 8, tuple(proportions))).resolve(SHAPE, len(proportions))
    cost = ModelCost(SHAPE, BF16)
    held = seats(plan, SHAPE).values()
    hidden, attention = SHAPE.hidden, (2 * 16 + 2 * 4) * 64
    assert sum(cost.layer_weights(seat) for seat in held) == hidden * (attention + 3 * SHAPE.ffn)
    assert sum(cost.vocab_weights(seat) for seat in held) == hidden * SHAPE.vocab
    assert sum(cost.kv_token_bytes(seat) for seat in held) == 2 * 8 * 4 * 64 * 2


def test_weights_and_matmul_together_are_the_measured_curve() -> None:
    layers = 8 * 1024 * ((2 * 16 + 2 * 4) * 64 + 3 * 4096)
    head = 1024 * 32000
    terms = model(staged(Stage((0,)))).replicas[0].interval(DECODE)
    assert terms.weights == pytest.approx(2 * (layers + head) / 2e10)
    assert terms.weights + terms.matmul == pytest.approx(2 * 16 * (layers + head) / MATMUL.flops_per_s("bfloat16", 16))
    last = 1024 * (16 * 64 + 3 * 4096)  # behind the last layer's keys and values nothing is left to do
    no_head = model(staged(Stage((0,)))).replicas[0].interval(DECODE._replace(samples=0))
    assert no_head.weights == pytest.approx(2 * (layers - last) / 2e10)
    prompt = model(staged(Stage((0,)))).replicas[0].interval(PREFILL)
    alone = 2 * (last + head) * max(1 / MATMUL.flops_per_s("bfloat16", 1), 1 / 2e10)
    rest = 2 * 512 * (layers - last) / MATMUL.flops_per_s("bfloat16", 512)
    assert prompt.weights + prompt.matmul == pytest.approx(rest + alone)
    assert terms.attention == pytest.approx(16 * 300 * 2 * 8 * 4 * 64 * 2 / 1e10)
    overhead = 2e-4 + 8 * 5e-5 + 16 * (3e-6 + 8 * 4 * 5e-7) + 16 * 8 * 1024 * 1e-9
    assert terms.overhead == pytest.approx(overhead + 16 * 32000 * 1e-10)
    ungated = model(staged(Stage((0,))), is_gated=False).replicas[0].interval(DECODE._replace(samples=0))
    assert ungated.weights == pytest.approx(2 * (layers - last - 7 * 1024 * 4096) / 2e10)


def test_decode_attention_is_bound_by_query_heads_or_by_memory() -> None:
    def attention(kv_heads: int, kv_dtype: str) -> float:
        shape = replace(SHAPE, num_kv_heads=kv_heads)
        plan = Plan.from_mesh().resolve(shape, 1)
        costs = CostModel(cluster(0), plan, shape, replace(BF16, kv_cache=kv_dtype))
        return costs.replicas[0].interval(DECODE).attention

    assert attention(8, "bfloat16") == attention(4, "bfloat16") == attention(2, "bfloat16")
    assert attention(16, "bfloat16") == pytest.approx(16 * 300 * 2 * 8 * 16 * 64 * 2 / 2e10)  # 4 of 4: memory
    assert attention(16, "float32") == pytest.approx(2 * attention(16, "bfloat16"))


def test_attention_of_prefill_counts_pairs() -> None:
    terms = model(staged(Stage((0,)))).replicas[0].interval(PREFILL)
    assert chunk_pairs(0, 512) == sum(range(1, 513)) and chunk_pairs(7, 3) == 8 + 9 + 10
    # In the last layer the prompt's last token alone attends.
    assert terms.attention == pytest.approx(4 * 7 * 16 * 64 * chunk_pairs(0, 512) / 5e10)


def test_packed_weights_are_fewer_bytes() -> None:
    plain = model(staged(Stage((0,)))).replicas[0].interval(DECODE)
    head_s = 1024 * 32000 / 2e10
    for dtype, size in (("int8", 1.0), ("int4", 0.5625)):
        packed = model(staged(Stage((0,))), dtypes=replace(BF16, weights=dtype)).replicas[0].interval(DECODE)
        assert packed.weights == pytest.approx(size * (plain.weights / 2 - head_s) + head_s)  # the head has 8 bits
    rates = {**MATMUL.rates, "int4": ((1, 9e10),), "int8": ((1, 9e10),)}
    on = cluster(0)
    on = replace(on, ranks=(replace(on.ranks[0], matmul=Matmul(rates)),))
    measured = model(staged(Stage((0,))), on, replace(BF16, weights="int4")).replicas[0].interval(DECODE)
    both = (plain.weights + plain.matmul) * MATMUL.flops_per_s("bfloat16", 16) / 9e10
    assert measured.weights + measured.matmul == pytest.approx(both)


def test_collectives_of_a_stage() -> None:
    """Two all-reduces a layer, one of the embedding, one small exchange of samples, and the command of the step."""
    on = cluster(0, 0)
    terms = model(Plan.from_mesh(tp=2), on).replicas[0].interval(DECODE)
    one = on.all_reduce_s([0, 1], 16 * 1024 * 2)
    assert terms.collectives == pytest.approx((2 * 8 + 1) * one + on.all_reduce_s([0, 1], 16))
    assert terms.transfers == 1e-6
    prompt = model(Plan.from_mesh(tp=2), on).replicas[0].interval(PREFILL).collectives
    wide, row, drawn = (on.all_reduce_s([0, 1], size) for size in (512 * 1024 * 2, 1024 * 2, 16))
    assert prompt == pytest.approx((2 * 7 + 1) * wide + 2 * row + drawn)


@pytest.mark.parametrize("bytes_per_s", [1e7, 1e10])
def test_sums_between_nodes_hide_behind_what_a_wide_step_computes(bytes_per_s: float) -> None:
    on = replace(cluster(0, 1), between_nodes=Link(3e-5, bytes_per_s))
    replica = model(Plan.from_mesh(tp=2), on).replicas[0]
    for tokens in (OVERLAP_ROWS - 1, OVERLAP_ROWS, 512):
        terms = replica.interval(StepWork(tokens, 1, 1, 0, chunk_pairs(0, tokens)))
        wide, row, drawn = (on.all_reduce_s([0, 1], size) for size in (tokens * 1024 * 2, 1024 * 2, 16))
        computed = terms.weights + terms.matmul + terms.attention + terms.overhead
        left = max(2 * 7 * wide - computed, 0) if tokens >= OVERLAP_ROWS else 2 * 7 * wide
        assert terms.collectives == pytest.approx(left + wide + 2 * row + drawn)


def test_an_int8_wire_carries_sums_between_nodes() -> None:
    on = replace(cluster(0, 1), between_nodes=Link(3e-5, 1e7))  # so slow that little of them hides
    plain, narrow = (
        model(Plan.from_mesh(tp=2), on, replace(BF16, wire=wire)).replicas[0].interval(PREFILL).collectives
        for wire in ("bfloat16", "int8")
    )
    assert narrow < 0.6 * plain


def test_activations_between_stages() -> None:
    on = cluster(0, 1)
    replica = model(Plan.from_mesh(pp=2), on).replicas[0]
    moved = Link(3e-5, 1e9).seconds(512 * 1024 * 2)
    assert replica.stages[0].terms(PREFILL).transfers == 0
    assert replica.stages[1].terms(PREFILL).transfers == pytest.approx(moved)
    single = model(Plan.from_mesh(), cluster(0)).replicas[0]
    # The whole way is both stages and what passes between them; the interval is the slower stage's.
    assert replica.latency_s(PREFILL) == pytest.approx(single.latency_s(PREFILL) + moved + PROFILE.step_s + 3e-6 + 3e-5)
    assert replica.step_s(PREFILL) == max(stage.terms(PREFILL).total for stage in replica.stages)
    assert replica.step_s(PREFILL, in_flight=1) == pytest.approx(replica.latency_s(PREFILL))
    wide = model(Plan.from_mesh(pp=2), on, replace(BF16, wire="float32")).replicas[0]
    assert wide.stages[1].terms(PREFILL).transfers == pytest.approx(Link(3e-5, 1e9).seconds(512 * 1024 * 4))


def test_the_slowest_rank_decides_and_shares_help() -> None:
    on = slowed(cluster(0, 0), 1, 2.0)
    even = model(Plan.from_mesh(tp=2), on).replicas[0].step_s(PREFILL)
    fast = model(Plan.from_mesh(tp=2), cluster(0, 0)).replicas[0].step_s(PREFILL)
    uneven = model(staged(Stage((0, 1), 0, (2.0, 1.0))), on).replicas[0].step_s(PREFILL)
    assert fast < uneven < even
    assert even / uneven > 1.25


def test_the_part_of_the_time_that_each_rank_computes() -> None:
    on = slowed(cluster(0, 0), 1, 2.0)
    (shares,) = model(Plan.from_mesh(tp=2), on).replicas[0].rank_shares(PREFILL)
    assert 0.5 < shares[0] < 0.6 and shares[1] == pytest.approx(1, abs=1e-3)
    front, back = model(staged(Stage((0,), 6), Stage((1,), 2)), cluster(0, 1)).replicas[0].rank_shares(PREFILL)
    assert front == (1.0,) and 0.15 < back[0] < 0.25  # of its 2 layers the prompt goes through one


@settings(max_examples=40, deadline=None)
@given(works, works, st.sampled_from([{"dp": 1}, {"tp": 2}, {"pp": 2}, {"pp": 2, "tp": 2}]))
def test_more_work_takes_no_less_time(some: StepWork, more: StepWork, mesh: dict[str, int]) -> None:
    both = StepWork(*(a + b for a, b in zip(some, more, strict=True)))
    replica = model(Plan.from_mesh(**mesh)).replicas[0]
    assert replica.step_s(some) <= replica.step_s(both) * (1 + 1e-9)
    assert replica.step_s(some) <= replica.step_s(some, 1) * (1 + 1e-9) <= replica.latency_s(some) * (1 + 1e-6)
    assert all(value >= 0 for value in replica.interval(some))


def random_work(source: random.Random) -> StepWork:
    if source.random() < 0.3:
        count = source.randint(16, 512)
        return StepWork(count, 1, 1, 0, chunk_pairs(0, count))
    count = source.randint(1, 64)
    return StepWork(count, count, count, count * source.randint(50, 1000))


def test_it_learns_what_the_profile_got_wrong_and_says_so() -> None:
    costs = model(Plan.from_mesh(dp=2))
    truth = dict(zip(TERMS, (1.4, 2.0, 0.5, 1.0, 1.0, 3.0), strict=True))
    source = random.Random(0)

    def seconds(work: StepWork) -> float:
        prior = costs.replicas[0].interval(work)
        return sum(truth[term] * getattr(prior, term) for term in TERMS) * source.uniform(0.97, 1.03)

    before = costs.predict(0, DECODE)
    assert costs.errors(0) is None and costs.table(0) == []
    for _ in range(400):
        work = random_work(source)
        costs.observe(0, work, seconds(work))
    errors = costs.errors(0)
    assert errors is not None and errors.num_steps == 256
    assert errors.learned_median < 0.03 < 0.2 < errors.prior_median
    assert errors.learned_median <= errors.learned_p95 < 0.12
    assert costs.predict(0, DECODE) == pytest.approx(seconds(DECODE), rel=0.1) != before
    rows = {row.term: row for row in costs.table(0)}
    assert tuple(rows) == TERMS
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert rows["matmul"].factor == pytest.approx(2.0, rel=0.25)
    # The other replica has learned nothing from this.
    assert costs.predict(1, DECODE) == before


def test_it_falls_back_to_the_profile_when_that_is_better() -> None:
    """Steps that agree with the profile in the median, but teach nonsense by wild outliers."""
    costs = model(Plan.from_mesh())
    source = random.Random(3)
    prior = costs.replicas[0].step_s(DECODE)
    for step in range(256):
        costs.observe(0, DECODE, prior * (source.uniform(5, 20) if step % 3 == 0 else 1.0))
    errors = costs.errors(0)
    assert errors is not None and errors.prior_median < errors.learned_median
    assert costs.predict(0, DECODE) == prior


def test_a_slowdown_is_learned_within_a_few_dozen_steps() -> None:
    costs = model(Plan.from_mesh())
    prior = costs.replicas[0].step_s(DECODE)
    for _ in range(200):
        costs.observe(0, DECODE, prior)
    for _ in range(300):
        costs.observe(0, DECODE, 4 * prior)
    assert costs.predict(0, DECODE) == pytest.approx(4 * prior, rel=0.05)


def test_the_price_of_a_request() -> None:
    costs = model(Plan.from_mesh())
    alone = costs.request_s(0, 300, 1, 1)
    chunk = StepWork(300, 1, 1, 0, chunk_pairs(0, 300))
    assert alone == pytest.approx(costs.predict(0, chunk))
    step = costs.predict(0, StepWork(1, 1, 1, 305))
    assert costs.request_s(0, 300, 11, 1) == pytest.approx(alone + 10 * step)
    # Shared steps are cheaper for each of those that share them, and no cheaper than their part of the whole.
    shared = costs.request_s(0, 300, 100, 16)
    assert shared < 0.5 * costs.request_s(0, 300, 100, 1)
    # A prompt of several chunks: at most 512 tokens a step.
    assert costs.request_s(0, 1024, 1, 1) > 2 * costs.request_s(0, 512, 1, 1) * 0.99


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 500),
    st.integers(1, 80),
    st.sampled_from([{"dp": 1}, {"pp": 2}, {"pp": 4}, {"tp": 2}]),
)
def test_longer_requests_cost_more(prompt: int, output: int, batch: int, mesh: dict[str, int]) -> None:
    costs = model(Plan.from_mesh(**mesh))
    price = costs.request_s(0, prompt, output, batch)
    assert 0 < price < costs.request_s(0, prompt, 2 * output, batch)
    assert price < costs.request_s(0, 2 * prompt, output, batch)


def test_terms_add_up() -> None:
    one = Terms(1, 2, 3, 4, 5, 6)
    assert one.total == 21 and one.plus(one) == Terms(2, 4, 6, 8, 10, 12)
    assert Terms._fields == TERMS
