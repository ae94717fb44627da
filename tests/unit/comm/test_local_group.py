"""Groups over threads: every operation against torch, and what the waits say when a rank is missing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import SUPPORTED
from lepton_dist.comm.world import World, local_worlds, run_local
from lepton_dist.errors import GradientError, RankLostError

MOVES_ONLY = {torch.bool, torch.float8_e4m3fn, torch.float8_e5m2}
MOVABLE = sorted(SUPPORTED, key=str)
REDUCIBLE = [dtype for dtype in MOVABLE if dtype not in MOVES_ONLY]


def sample(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + sum(shape))
    return (torch.rand(shape, generator=generator) * 30).to(dtype)


def in_rank_order(rows: list[Tensor]) -> Tensor:
    dtype = rows[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = rows[0].to(wide)
    for row in rows[1:]:
        total = total + row.to(wide)
    return total.to(dtype)


def everyone(world: World) -> Group:
    return world.group(range(world.size), "everyone")


@pytest.mark.parametrize("dtype", REDUCIBLE, ids=str)
@settings(max_examples=8)
@given(size=st.integers(1, 4), shape=st.lists(st.integers(0, 7), max_size=3).map(tuple))
def test_reductions(dtype: torch.dtype, size: int, shape: tuple[int, ...]) -> None:
    rows = [sample(rank, shape, dtype) for rank in range(size)]
    tables = [sample(rank, (size, *shape), dtype) for rank in range(size)]

    def body(world: World) -> tuple[Tensor, Tensor, Tensor]:
        group = everyone(world)
        return (
            group.all_reduce(rows[world.rank].clone()),
            group.all_reduce(rows[world.rank].clone(), "max"),
            group.reduce_scatter(tables[world.rank]),
        )

    for rank, (total, highest, mine) in enumerate(run_local(size, body)):
        assert torch.equal(total, in_rank_order(rows))
        assert torch.equal(highest, torch.stack(rows).amax(0))
        assert torch.equal(mine, in_rank_order([table[rank] for table in tables]))


@pytest.mark.parametrize("dtype", MOVABLE, ids=str)
@settings(max_examples=5)
@given(size=st.integers(1, 4), shape=st.lists(st.integers(0, 5), max_size=2).map(tuple), data=st.data())
def test_moves(dtype: torch.dtype, size: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size - 1))
    tables = [sample(rank, (size, *shape), dtype) for rank in range(size)]

    def body(world: World) -> tuple[Tensor, Tensor, Tensor]:
        group = everyone(world)
        return (
            group.all_gather(tables[world.rank]),
            group.all_to_all(tables[world.rank]),
            group.broadcast(tables[world.rank].clone(), root),
        )

    for rank, (gathered, swapped, sent) in enumerate(run_local(size, body)):
        assert torch.equal(gathered.float(), torch.stack(tables).float())
        assert torch.equal(swapped.float(), torch.stack([table[rank] for table in tables]).float())
        assert torch.equal(sent.float(), tables[root].float())
        assert gathered.dtype == swapped.dtype == sent.dtype == dtype


def test_bfloat16_is_rounded_once() -> None:
    """256 + 1 + 1 in bfloat16 is 256 when each addition rounds, and 258 when only the result does."""
    values = [256.0, 1.0, 1.0]
    results = run_local(3, lambda world: everyone(world).all_reduce(torch.tensor([values[world.rank]]).bfloat16()))
    assert [result.item() for result in results] == [258.0] * 3


def test_messages_are_matched_in_order_by_tag_and_sender() -> None:
    def body(world: World) -> list[float]:
        group = everyone(world)
        if world.rank > 0:
            for number in range(3):
                group.isend(torch.tensor([10.0 * world.rank + number]), 0, tag=number % 2).wait()
            return []
        buffers = [torch.zeros(1) for _ in range(3)]
        handles = [group.irecv(buffers[i], 2, tag=tag) for i, tag in enumerate((1, 0, 0))]
        for handle in reversed(handles):
            handle.wait()
        return [buffer.item() for buffer in buffers]

    assert run_local(3, body)[0] == [21.0, 20.0, 22.0]


def test_mailboxes_deliver_in_order_and_to_self() -> None:
    def body(world: World) -> list[tuple[int, bytes]]:
        mailbox, group = world.mailbox("m"), everyone(world)
        for number in range(3):
            mailbox.send((world.rank + 1) % 2, bytes([number]))
        mailbox.send(world.rank, b"self")
        mailbox.flush()
        group.barrier()
        return list(iter(mailbox.poll, None))

    for rank, messages in enumerate(run_local(2, body)):
        other = 1 - rank
        assert [payload for source, payload in messages if source == other] == [b"\0", b"\1", b"\2"]
        assert [payload for source, payload in messages if source == rank] == [b"self"]


def test_a_missing_rank_is_named() -> None:
    def body(world: World) -> str:
        group = everyone(world)
        world.patience.seconds = 0.2
        world.patience.phase = "stepping"
        if world.rank == 1:
            return ""
        with pytest.raises(RankLostError) as caught:
            group.barrier()
        return str(caught.value)

    messages = run_local(3, body)
    wanted = "while stepping: waited 0.2 s for barrier number 1 of group 'everyone'; not arrived: rank 1 (threads of"
    assert messages[0].startswith(wanted) and messages[2].startswith(wanted)


def test_the_first_error_is_raised_and_the_others_are_released() -> None:
    def body(world: World) -> None:
        group = everyone(world)
        if world.rank == 1:
            raise ZeroDivisionError("the cause")
        group.barrier()

    with pytest.raises(ZeroDivisionError, match="the cause"):
        run_local(3, body, seconds=20)


def test_a_deadline_ends_local_runs() -> None:
    def body(world: World) -> None:
        group = everyone(world)
        if world.rank == 0:
            group.irecv(torch.zeros(1), 1).wait()

    with pytest.raises(RankLostError, match=r"local ranks 0 of 2 did not end within 0\.3 s"):
        run_local(2, body, seconds=0.3)


def test_a_group_of_one_is_free() -> None:
    (world,) = local_worlds(1, Patience())
    group = world.group([0], "alone")
    tensor = torch.ones(1, 3)
    assert group.all_reduce(tensor) is tensor and group.all_to_all(tensor) is tensor
    assert group.broadcast(tensor) is tensor
    assert group.all_gather(tensor).data_ptr() == tensor.data_ptr()
    assert group.reduce_scatter(tensor).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="to=0 is this rank itself"):
        group.isend(tensor, 0)
    with pytest.raises(ValueError, match="root=1 is not a rank of group 'alone', which has 1 ranks"):
        group.broadcast(tensor, 1)


def test_refusals() -> None:
    def body(world: World) -> None:
        group = everyone(world)
        for dtype in MOVES_ONLY:
            with pytest.raises(TypeError, match=f"cannot reduce {dtype}"):
                group.all_reduce(torch.zeros(3).to(dtype))
        with pytest.raises(TypeError, match=r"all_gather cannot carry torch\.complex64; it carries bfloat16, bool"):
            group.all_gather(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"shape \(2, 3\) and strides \(1, 2\)"):
            group.irecv(torch.zeros(3, 2).t(), 1 - world.rank)
        with pytest.raises(ValueError, match=r"tag 8192 is outside 0\.\.8191"):
            group.isend(torch.zeros(1), 1 - world.rank, tag=8192)
        with pytest.raises(ValueError, match="group 'g' of ranks \\[0, 0, 1\\]: a rank is named twice"):
            world.group([0, 0, 1], "g")

    run_local(2, body)


@pytest.mark.parametrize(
    "operation", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "isend", "irecv"]
)
def test_a_gradient_is_not_lost_in_silence(operation: str) -> None:
    def body(world: World) -> None:
        group = everyone(world)
        peer = () if operation not in ("isend", "irecv") else (1 - group.rank,)
        call = getattr(group, operation)
        with pytest.raises(GradientError, match=operation):
            call(torch.ones(2, 3, requires_grad=True) * 2, *peer)
        if not peer:
            with torch.no_grad():
                call(torch.ones(2, 3, requires_grad=True), *peer)
            call((torch.ones(2, 3, requires_grad=True) * 2).detach(), *peer)

    run_local(2, body)
