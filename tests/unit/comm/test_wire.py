"""int8 on the wire: how far a value may be off, what an outlier costs, and that every rank ends with the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lepton_dist.comm.wire import EXACT_BYTES, Codec, Int8AllReduce, Packets, group_channels, make_wire
from lepton_dist.comm.world import World, run_local
from lepton_dist.parallel.stage import reduce_over
from lepton_dist.plan.axes import Axis


def activations(seed: int, tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values with a few channels that are a hundred times larger, as residual streams have them."""
    x = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    x[:, ::350] *= 100
    return x.to(dtype)


def half_scales(x: Tensor) -> Tensor:
    """The most that a value may be off: half of its group's scale, which bfloat16 rounds up by 1/256 at most."""
    groups = x.float().view(-1, group_channels(x.shape[-1]))
    return (groups.abs().amax(1, keepdim=True) / 254 * (1 + 2**-8)).expand_as(groups).reshape(x.shape)


def round_trip(values: Tensor) -> Tensor:
    packets, out = Packets.empty(1, *values.shape), torch.empty(1, *values.shape)
    Codec().write(packets, values.unsqueeze(0))
    Codec().read(Packets(packets.memory.clone(), *values.shape), out)
    return out[0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 9),
    width=st.sampled_from([1, 2, 8, 64]),
    exponent=st.integers(-25, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_value_is_off_by_half_a_scale_at_most(
    seed: int, count: int, width: int, exponent: int, dtype: torch.dtype
) -> None:
    values = (activations(seed, count, width) * 10.0**exponent).to(dtype)
    assert ((round_trip(values) - values.float()).abs() <= half_scales(values) * (1 + 1e-5)).all()


def test_an_outlier_costs_its_own_group_only() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    before = round_trip(values)
    values[2, 5] = 4000.0
    after = round_trip(values)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert after[2, 5] == pytest.approx(4000, rel=1e-2)


def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden() -> None:
    values = torch.ones(5, 64)
    values[0], values[1], values[2, 7], values[3, 8] = 0.0, 1e-38, math.nan, math.inf
    result = round_trip(values)
    assert (result[:2] == 0).all() and result[2].isnan().all() and result[3].isnan().all()
    assert torch.allclose(result[4], values[4], rtol=5e-3)


@pytest.mark.parametrize(("channels", "width"), [(2048, 64), (96, 32), (100, 4), (7, 1)])
def test_groups_fill_a_token(channels: int, width: int) -> None:
    assert group_channels(channels) == width
    wire, hidden = make_wire(channels, torch.int8), activations(1, 3, channels)
    packed = wire.pack(hidden)
    assert packed.shape == wire.buffer(3).shape and packed.dtype == wire.buffer(3).dtype
    assert packed.numel() <= 3 * channels * (1 + 2 / width) + 1
    assert ((wire.unpack(packed) - hidden).abs() <= half_scales(hidden) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_wire_is_a_dtype(dtype: torch.dtype) -> None:
    wire, hidden = make_wire(32, dtype), activations(2, 5, 32)
    assert wire.buffer(5).dtype == dtype and wire.buffer(5).shape == (5, 32)
    assert torch.equal(wire.unpack(wire.pack(hidden)), hidden.to(dtype).float())


def sums(size: int, rows: list[Tensor]) -> list[Tensor]:
    """What each of `size` ranks makes of the rows of all."""

    def body(world: World) -> Tensor:
        return Int8AllReduce(world.group(range(size), "all"))(rows[world.rank].clone())

    return run_local(size, body)


# 33 and 301 tokens of 11 groups do not divide by the sizes.
@pytest.mark.parametrize("tokens", [24, 33, 301])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_near_and_the_same_on_every_rank(tokens: int, size: int, dtype: torch.dtype) -> None:
    rows = [activations(rank, tokens, 704, dtype) for rank in range(size)]
    exact = sum(row.double() for row in rows)
    found = sums(size, rows)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert found[0].dtype == dtype and found[0].shape == (tokens, 704)
    rounding = exact.abs() * (2**-8 if dtype == torch.bfloat16 else 1e-6)
    # Each addend is off by half a scale, and so is the sum of what they became.
    first = sum(half_scales(row) for row in rows)
    most = first + half_scales(exact.float().abs() + 2 * first) + rounding
    assert ((found[0] - exact).abs() <= most).all()
    assert (found[0] - exact).norm() / exact.norm() < 0.03


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    rows = [activations(rank, 400, 256) for rank in range(3)]
    whole = sums(3, rows)[0]
    part = sums(3, [row[100:300] for row in rows])[0]
    assert torch.equal(part, whole[100:300])


def test_short_messages_are_exact() -> None:
    rows = [activations(rank, EXACT_BYTES // 4 // 256, 256) for rank in range(2)]
    assert torch.equal(sums(2, rows)[1], rows[0] + rows[1])


def test_only_sums_between_nodes_are_packed() -> None:
    def body(world: World) -> list[bool]:
        exact: list[bool] = []
        for nodes, wire in (((0, 0), torch.int8), ((0, 1), torch.bfloat16), ((0, 1), torch.int8)):
            world.nodes = nodes
            group = world.group([0, 1], "tp")
            assert group.num_nodes == len(set(nodes))
            reduce = reduce_over(group, wire)
            exact += [_is_exact(reduce(axis), world.rank) for axis in (Axis.FFN, Axis.HEADS, Axis.VOCAB)]
        return exact

    for exact in run_local(2, body):
        assert exact == [True] * 6 + [False, False, True]


def _is_exact(reduce: Callable[[Tensor], Tensor], rank: int) -> bool:
    rows = [activations(seed, 40, 256) for seed in range(2)]
    return torch.equal(reduce(rows[rank].clone()), rows[0] + rows[1])
