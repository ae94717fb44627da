"""Staging through host memory, with tensors of the CPU in the place of a GPU's: the same code without the streams."""

from __future__ import annotations

import pytest
import torch

from lepton_dist.comm.devices import Devices
from lepton_dist.comm.group import Group
from lepton_dist.comm.transport import PointToPoint
from lepton_dist.comm.transports.aware import AwareMessages
from lepton_dist.comm.transports.courier import Courier
from lepton_dist.comm.transports.staged import StagedMessages, StagedTransport
from lepton_dist.comm.world import World
from lepton_dist.plan.devices import Binding, Sight


@pytest.fixture
def staged(world: World, everyone: Group) -> StagedTransport:
    return StagedTransport(everyone, world.patience)


@pytest.fixture
def staged_messages(world: World, everyone: Group) -> StagedMessages:
    return StagedMessages(everyone, Courier(), world.patience)


def mine(world: World, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(12).view(3, 4) + world.rank).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_collectives(world: World, staged: StagedTransport, dtype: torch.dtype, op: str) -> None:
    size, x = world.size, mine(world, dtype)
    every = torch.stack([x - world.rank + rank for rank in range(size)])
    reduced = every.sum(dim=0).to(dtype) if op == "sum" else every.amax(dim=0)
    found = x.clone()
    staged.all_reduce(x.shape, dtype, op, "direct")(found)
    assert torch.equal(found, reduced)
    gathered = torch.empty(size, *x.shape, dtype=dtype)
    staged.all_gather(gathered, x)
    assert torch.equal(gathered, every)
    scattered = torch.empty(4, dtype=dtype)
    rows = x[:1].expand(size, 4).contiguous()
    staged.reduce_scatter(scattered, rows, op)
    assert torch.equal(scattered, reduced[0])
    swapped = torch.empty_like(rows)
    staged.all_to_all(swapped, rows)
    assert torch.equal(swapped, every[:, 0])
    shared = x.clone()
    staged.broadcast(shared, size - 1)
    assert torch.equal(shared, every[-1])
    staged.barrier()


@pytest.mark.parametrize("kind", ["staged", "CUDA-aware"])
def test_a_gpu_rank_and_a_plain_one_understand_each_other(
    world: World, everyone: Group, staged_messages: StagedMessages, kind: str
) -> None:
    """Rank 0 sends as a GPU rank does; rank 1 as a CPU rank."""
    if world.rank > 1:
        return
    messages: PointToPoint = staged_messages
    if kind == "CUDA-aware":
        assert everyone._messages is not None
        messages = AwareMessages(everyone._messages, "everyone", Courier(), world.patience)
    first, second = torch.arange(5.0), torch.arange(5.0).to(torch.bfloat16) * 3
    if world.rank == 0:
        sends = [messages.isend(first, 1, 0), messages.isend(second, 1, 0)]
        back = torch.empty(5)
        messages.irecv(back, 1, 7).wait()
        for send in sends:
            send.wait()
        assert torch.equal(back, first + 1)
    else:
        plain, later = torch.empty(5), torch.empty(5, dtype=torch.bfloat16)
        everyone.irecv(plain, 0).wait()
        everyone.irecv(later, 0).wait()
        assert torch.equal(plain, first) and torch.equal(later, second)
        everyone.isend(plain + 1, 0, 7).wait()


def test_a_group_with_a_cpu_rank_or_a_shared_gpu_needs_no_nccl(world: World) -> None:
    """Serving such a group imports no CUDA and talks to nobody: rank 0 alone may do it."""
    group = world.group(range(world.size), "mixed")
    cpu = Devices.of(world.rank, [Binding()] * world.size, [Sight()] * world.size, world.patience)
    assert cpu.serve(group).gpu_transport is None
    shared = [Binding(0, (1, 1), 2)] * world.size
    sights, device = [Sight(((1, 1),), True)] * world.size, torch.device("cuda", 0)
    gpu = Devices(shared, sights, device, Courier(), cpu.wait, cpu.patience)
    if world.rank == 0:
        assert gpu.serve(group).gpu_transport == "staged"


def test_messages_are_staged_unless_the_library_says_that_it_is_cuda_aware(world: World, everyone: Group) -> None:
    """The wheels that the tests install are not."""
    from lepton_dist.comm.transports.mpi_fabric import is_cuda_aware

    assert not is_cuda_aware()
    assert everyone.gpu_messages is None
