"""Every collective on every carrier, dtype and awkward size, against torch. Runs inside mpirun (test_under_mpirun)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lepton_dist.comm.calibrate import calibrate, report
from lepton_dist.comm.group import Group
from lepton_dist.comm.tensors import SUPPORTED
from lepton_dist.comm.world import World
from lepton_dist.errors import GradientError

pytestmark = pytest.mark.mpi(min_size=2)

REDUCIBLE = sorted((d for d in SUPPORTED if d is not torch.bool and "float8" not in str(d)), key=str)
MOVABLE = sorted(SUPPORTED, key=str)
SIZES = [0, 1, 2, 7, 1021, 65537]
LARGER_THAN_A_SLOT = 400_003


def sample(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Deterministic values of one rank, whose sums are inexact in the 16-bit floats and float32."""
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 3).to(dtype)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(-9 if dtype.is_signed else 0, 40, shape, generator=generator).to(dtype)


def in_rank_order(rows: list[Tensor]) -> Tensor:
    """What a sum must be, bit for bit: rank order, in float32 for the 16-bit floats, rounded once."""
    dtype = rows[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = rows[0].to(wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return total.to(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", REDUCIBLE, ids=str)
def test_all_reduce_sums_in_rank_order_bit_for_bit(carried: Group, dtype: torch.dtype) -> None:
    for size in [*SIZES, LARGER_THAN_A_SLOT]:
        rows = [sample(rank, (size,), dtype) for rank in range(carried.size)]
        mine = rows[carried.rank].clone()
        assert carried.all_reduce(mine) is mine
        assert same_bits(mine, in_rank_order(rows)), size


@pytest.mark.parametrize("dtype", REDUCIBLE, ids=str)
def test_all_reduce_max(carried: Group, dtype: torch.dtype) -> None:
    for size in SIZES:
        rows = [sample(rank, (size, 2), dtype) for rank in range(carried.size)]
        assert same_bits(carried.all_reduce(rows[carried.rank].clone(), "max"), torch.stack(rows).amax(0)), size


def test_all_reduce_of_nan_gives_the_same_bits_everywhere(carried: Group) -> None:
    mine = torch.full((33,), float(carried.rank))
    if carried.rank == 1:
        mine[5] = float("nan")
    summed = carried.all_reduce(mine.clone())
    highest = carried.all_reduce(mine.clone(), "max")
    assert summed[5].isnan() and highest[5].isnan() and not summed[4].isnan()
    for result in (summed, highest):
        assert all(same_bits(row, result) for row in carried.all_gather(result))


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
def test_all_gather(carried: Group, dtype: torch.dtype) -> None:
    for size in SIZES:
        rows = [sample(rank, (size,), dtype) for rank in range(carried.size)]
        assert same_bits(carried.all_gather(rows[carried.rank]), torch.stack(rows)), size


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
def test_broadcast(carried: Group, dtype: torch.dtype) -> None:
    for root in range(carried.size):
        for size in SIZES:
            mine = sample(carried.rank, (size,), dtype)
            assert same_bits(carried.broadcast(mine, root), sample(root, (size,), dtype)), (root, size)


@pytest.mark.parametrize("dtype", REDUCIBLE, ids=str)
def test_reduce_scatter(carried: Group, dtype: torch.dtype) -> None:
    for size in SIZES:
        tables = [sample(rank, (carried.size, size), dtype) for rank in range(carried.size)]
        result = carried.reduce_scatter(tables[carried.rank])
        assert same_bits(result, in_rank_order([table[carried.rank] for table in tables])), size


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
def test_all_to_all(carried: Group, dtype: torch.dtype) -> None:
    for size in SIZES:
        tables = [sample(rank, (carried.size, size), dtype) for rank in range(carried.size)]
        wanted = torch.stack([table[carried.rank] for table in tables])
        assert same_bits(carried.all_to_all(tables[carried.rank]), wanted), size


def test_operations_larger_than_a_piece_or_a_slot(carried: Group) -> None:
    mpi = carried._transports["mpi"]
    before, mpi.piece_bytes = mpi.piece_bytes, 10_000
    carried.use_table(carried.table)  # makes the routines anew, with the smaller pieces
    try:
        shape = (carried.size, LARGER_THAN_A_SLOT)
        tables = [sample(rank, shape, torch.bfloat16) for rank in range(carried.size)]
        mine = tables[carried.rank]
        columns = [table[carried.rank] for table in tables]
        assert same_bits(carried.all_reduce(mine.clone()), in_rank_order(tables))
        assert same_bits(carried.all_gather(mine), torch.stack(tables))
        assert same_bits(carried.reduce_scatter(mine), in_rank_order(columns))
        assert same_bits(carried.all_to_all(mine), torch.stack(columns))
        assert same_bits(carried.broadcast(mine.clone(), carried.size - 1), tables[-1])
    finally:
        mpi.piece_bytes = before


def test_tensors_that_are_not_plain(carried: Group) -> None:
    rows = [sample(rank, (6, 10), torch.float32) for rank in range(carried.size)]
    strided = rows[carried.rank].clone().t()
    carried.all_reduce(strided)
    assert same_bits(strided, in_rank_order([row.t() for row in rows]))
    scalar = carried.all_reduce(torch.tensor(carried.rank + 1))
    assert scalar.item() == sum(range(1, carried.size + 1))
    weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(GradientError, match="passes no gradient on"):  # before any rank waits for another
        carried.all_reduce(weight)
    with torch.no_grad():
        assert carried.all_reduce(weight.detach()).tolist() == [float(carried.size)] * 4
    with torch.inference_mode():
        inner = carried.all_reduce(torch.ones(77))
    assert inner.tolist() == [float(carried.size)] * 77
    assert carried.all_reduce(torch.ones(77)).tolist() == [float(carried.size)] * 77
    table = torch.arange(12.0).view(6, 2).t() + carried.rank
    assert same_bits(carried.broadcast(table, 1), torch.arange(12.0).view(6, 2).t() + 1)


def test_many_operations_in_a_row_keep_their_rounds_apart(carried: Group) -> None:
    for step in range(60):
        size = 1 + step * 37 % 500
        assert (
            carried.all_reduce(torch.full((size,), carried.rank + step)).tolist()
            == [sum(range(carried.size)) + carried.size * step] * size
        )
        if step % 3 == 0:
            carried.barrier()
        if step % 5 == 0:
            root = step % carried.size
            assert carried.broadcast(torch.tensor([carried.rank]), root).item() == root


def test_refusals_name_what_to_change(everyone: Group) -> None:
    with pytest.raises(TypeError, match=r"all_reduce cannot carry torch\.complex64"):
        everyone.all_reduce(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"cannot reduce torch\.float8_e4m3fn: convert it first"):
        everyone.all_reduce(torch.zeros(2).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=f"needs a first dim of {everyone.size}; the tensor has shape \\(1, 3\\)"):
        everyone.all_to_all(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="'sum' and 'max', not 'mean'"):
        everyone.all_reduce(torch.zeros(2), "mean")
    with pytest.raises(TypeError, match="meta"):
        everyone.all_reduce(torch.zeros(2, device="meta"))


def test_calibration_ends_in_time_and_decides_alike(world: World) -> None:
    group = world.group(range(world.size), "to be calibrated")
    timings = calibrate(group, 0.1)
    assert timings and len(report(timings)) == len(timings)
    assert group.table is not None
    lines = "\n".join(group.table.lines()).encode().ljust(4000)
    texts = group.all_gather(torch.frombuffer(bytearray(lines), dtype=torch.uint8))
    assert all(torch.equal(row, texts[0]) for row in texts)
    assert group.all_reduce(torch.ones(5000)).sum().item() == 5000 * world.size
