"""NCCL through CuPy with the one rank that any GPU allows: every dtype, messages to self, capture in a graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lepton_dist.comm.devices import nccl_problem
from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import SUPPORTED
from lepton_dist.comm.transport import Links

pytestmark = pytest.mark.skipif(bool(nccl_problem()), reason=f"CuPy's NCCL cannot be loaded: {nccl_problem()}")
REDUCIBLE = [dtype for dtype in SUPPORTED if dtype not in (torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)]


@pytest.fixture(scope="module")
def link() -> Iterator[object]:
    from lepton_dist.comm.transports.nccl import join

    made = join(Group("alone", [0], 0, Links()), torch.device("cuda", 0), Patience(60.0, "testing"))
    yield made
    made.close()


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1, 13, device="cuda").view(3, 4).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu()


@pytest.mark.parametrize("dtype", sorted(REDUCIBLE, key=str))
@pytest.mark.parametrize("op", ["sum", "max"])
def test_all_reduce(link, dtype: torch.dtype, op: str) -> None:
    from lepton_dist.comm.transports.nccl import NcclTransport

    x = values(dtype)
    NcclTransport(link).all_reduce(x.shape, dtype, op, "direct")(x)
    assert torch.equal(bits(x), bits(values(dtype))) and not link.failure()


@pytest.mark.parametrize("dtype", sorted(SUPPORTED, key=str))
def test_what_moves_arrives(link, dtype: torch.dtype) -> None:
    from lepton_dist.comm.transports.nccl import NcclTransport

    transport, x = NcclTransport(link), values(dtype)
    gathered = torch.empty(1, 3, 4, dtype=dtype, device="cuda")
    transport.all_gather(gathered, x)
    swapped = torch.empty_like(gathered)
    transport.all_to_all(swapped, gathered)  # a group call: a send to self and its receive
    transport.broadcast(x, 0)
    transport.barrier()
    for found in (gathered, swapped, x):
        assert torch.equal(bits(found), bits(values(dtype)))


def test_operations_are_captured_in_a_graph(link) -> None:
    from lepton_dist.comm.transports.nccl import NcclTransport

    transport = NcclTransport(link)
    x, rows, swapped = torch.ones(8, device="cuda"), torch.ones(1, 8, device="cuda"), torch.zeros(1, 8, device="cuda")

    def step() -> None:
        x.mul_(2)
        transport.all_reduce(x.shape, x.dtype, "sum", "direct")(x)
        transport.all_to_all(swapped, rows)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    rows.fill_(5)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(x.cpu(), torch.full((8,), 16.0)) and torch.equal(swapped.cpu(), torch.full((1, 8), 5.0))


def test_work_goes_to_the_current_stream(link) -> None:
    """A sum on a side stream waits for what that stream did before, with no synchronisation of ours."""
    from lepton_dist.comm.transports.nccl import NcclTransport

    transport, side = NcclTransport(link), torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.zeros(1 << 20, device="cuda")
        torch.cuda._sleep(50_000_000)
        x.fill_(3)
        transport.all_reduce(x.shape, x.dtype, "sum", "direct")(x)
        total = x.sum()
    side.synchronize()
    assert float(total) == 3 * (1 << 20)
