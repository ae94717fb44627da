"""Activations between stages of unequal width: one group where all are CPUs, a group for each hop of a GPU."""

from __future__ import annotations

import pytest
import torch

from lepton_dist.comm.devices import Devices
from lepton_dist.comm.world import World, run_local
from lepton_dist.parallel.stage import StageLink, hops, open_hops
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.devices import Binding, Sight
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.placement import seats

SHAPE = ModelShape(num_layers=3, hidden=4, num_heads=8, num_kv_heads=8, head_dim=8, ffn=128, vocab=256)
PLAN = "replicas: [{stages: [{ranks: [0, 1]}, {ranks: [4, 2, 3]}, {ranks: [5]}]}]"


def test_every_rank_behind_the_first_stage_has_one_source() -> None:
    replica = parse_plan(PLAN).resolve(SHAPE, 6).replicas[0]
    assert hops(replica) == [(0, 4), (1, 2), (0, 3), (4, 5)]


@pytest.mark.parametrize("gpus", [(), (0,), (3, 5), (0, 1, 2, 3, 4, 5)], ids=str)
def test_activations_arrive_whatever_computes_them(gpus: tuple[int, ...]) -> None:
    """The devices are said to be GPUs, and the tensors are the CPU's: only who opens which group depends on them."""
    plan = parse_plan(PLAN).resolve(SHAPE, 6)
    bindings = [Binding(0, (rank, rank)) if rank in gpus else Binding() for rank in range(6)]

    def body(world: World) -> tuple[set[str], list[float]]:
        seat = seats(plan, SHAPE)[world.rank]
        cpu = Devices.of(world.rank, [Binding()] * 6, [Sight()] * 6, world.patience)
        devices = Devices(bindings, cpu.sights, cpu.device, cpu.courier, cpu.wait, cpu.patience)
        groups = open_hops(world, plan.replicas[0], seat, devices)
        link = StageLink(seat, groups, SHAPE.hidden, torch.float32)
        found = []
        for _ in range(3):
            link.expect(2)
        for step in range(3):
            hidden = torch.full((2, 4), float(step)) if seat.is_first else link.receive() + 10
            found.append(float(hidden[0, 0]))
            link.send(hidden)
        link.flush()
        return {group.name for group in groups.values()}, found

    results = run_local(6, body)
    for rank, (names, found) in enumerate(results):
        depth = seats(plan, SHAPE)[rank].stage
        assert found == [step + 10.0 * depth for step in range(3)]
        expected = set()
        for hop in hops(plan.replicas[0]):
            if rank in hop:
                expected.add(f"hop-{hop[0]}-{hop[1]}" if set(hop) & set(gpus) else "replica0")
        assert names == expected
