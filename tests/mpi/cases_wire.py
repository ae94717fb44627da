"""int8 on the wire over real carriers: near the exact sum, and the same bits on every rank. Runs inside mpirun."""

from __future__ import annotations

import pytest
import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.wire import Int8AllReduce, make_wire
from tests.mpi.cases_collectives import same_bits, sample

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("tokens", [3, 301])  # as it is, and packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_sums(carried: Group, tokens: int, dtype: torch.dtype) -> None:
    rows = [sample(rank, (tokens, 640), dtype) for rank in range(carried.size)]
    exact = torch.stack(rows).double().sum(0)
    mine = rows[carried.rank].clone()
    result = Int8AllReduce(carried)(mine)
    assert result.data_ptr() == mine.data_ptr()
    assert ((result - exact).norm() / exact.norm()).item() < 0.015
    assert all(same_bits(row, result) for row in carried.all_gather(result))


def test_int8_messages(everyone: Group) -> None:
    """Around the ring, as between stages."""
    wire, hidden = make_wire(320, torch.int8), sample(everyone.rank, (37, 320), torch.float32)
    buffer = wire.buffer(37)
    before = (everyone.rank - 1) % everyone.size
    receiving = everyone.irecv(buffer, before)
    sending = everyone.isend(wire.pack(hidden), (everyone.rank + 1) % everyone.size)
    receiving.wait()
    sending.wait()
    expected = wire.unpack(wire.pack(sample(before, (37, 320), torch.float32)))
    assert same_bits(wire.unpack(buffer), expected)
