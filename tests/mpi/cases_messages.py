"""Sub-groups, messages between two ranks, and mailboxes. Runs inside mpirun: see test_under_mpirun."""

from __future__ import annotations

import time

import pytest
import torch

from lepton_dist.comm.group import Group
from lepton_dist.comm.mailbox import Mailbox
from lepton_dist.comm.world import World

pytestmark = pytest.mark.mpi(min_size=2)


def next_message(mailbox: Mailbox) -> tuple[int, bytes]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        message = mailbox.poll()
        if message is not None:
            return message
        time.sleep(0.0005)
    raise AssertionError("no message within 20 s")


def test_the_world_knows_its_hosts_and_nodes(world: World) -> None:
    assert len(world.hosts) == len(world.nodes) == world.size
    assert set(world.nodes) == {0} and world.local_rank == world.rank
    assert len(set(world.hosts)) == 1 and world.hosts[0]
    assert world.library


def test_groups_that_overlap(world: World) -> None:
    pairs = [(low, high) for high in range(world.size) for low in range(high)]
    groups = {pair: world.group(pair, f"pair {pair}") for pair in pairs if world.rank in pair}
    for pair, group in groups.items():
        assert (group.members, group.size, group.rank) == (pair, 2, pair.index(world.rank))
        assert group.all_reduce(torch.tensor([world.rank])).item() == sum(pair)


def test_members_may_come_in_another_order(world: World) -> None:
    members = list(reversed(range(world.size)))
    group = world.group(members, "backwards")
    assert group.rank == world.size - 1 - world.rank
    assert group.all_gather(torch.tensor(world.rank)).tolist() == members


def test_the_same_name_twice_gives_two_groups(world: World) -> None:
    first, second = (world.group(range(world.size), "twin") for _ in range(2))
    assert first.all_reduce(torch.ones(3)).tolist() == second.all_reduce(torch.ones(3)).tolist() == [world.size] * 3


def test_a_group_of_one_returns_its_input(world: World) -> None:
    group = world.group([world.rank], "alone")
    tensor = torch.arange(4.0).view(1, 4)
    assert group.transports == () and group.table is None
    assert group.all_reduce(tensor) is tensor and group.broadcast(tensor) is tensor
    assert group.all_to_all(tensor) is tensor
    assert group.all_gather(tensor).shape == (1, 1, 4) and group.reduce_scatter(tensor).shape == (4,)
    group.barrier()


def test_wrong_members_are_refused_before_any_message(world: World) -> None:
    with pytest.raises(ValueError, match=f"rank 9 is not in this world, which has {world.size} ranks"):
        world.group([world.rank, 9], "outside")
    with pytest.raises(ValueError, match="only members may open a group"):
        world.group([(world.rank + 1) % world.size], "others")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.float32, torch.int64], ids=str)
def test_messages_around_a_ring(everyone: Group, dtype: torch.dtype) -> None:
    after, before = (everyone.rank + 1) % everyone.size, (everyone.rank - 1) % everyone.size
    for size in (0, 1, 1021, 300_007):
        received = torch.empty(size, dtype=dtype)
        receive = everyone.irecv(received, before, tag=3)
        send = everyone.isend((torch.arange(size) % 5 + everyone.rank).to(dtype), after, tag=3)
        send.wait()
        receive.wait()
        assert receive.test()
        assert torch.equal(received.double(), (torch.arange(size) % 5 + before).to(dtype).double())


def test_messages_in_pieces_keep_their_order_and_tags(everyone: Group) -> None:
    mpi = everyone._messages
    mpi.piece_bytes, before = 1000, mpi.piece_bytes
    try:
        if everyone.rank == 0:
            sends = [everyone.isend(torch.full((997,), float(i)), 1, tag=i % 2) for i in range(4)]
            for send in sends:
                send.wait()
        elif everyone.rank == 1:
            buffers = [torch.empty(997) for _ in range(4)]
            handles = [everyone.irecv(buffers[i], 0, tag=i % 2) for i in (1, 0, 3, 2)]
            for handle in handles:
                handle.wait()
            assert [buffer.unique().tolist() for buffer in buffers] == [[0.0], [1.0], [2.0], [3.0]]
    finally:
        mpi.piece_bytes = before
    everyone.barrier()


def test_a_message_under_way_does_not_stop_a_collective(world: World, everyone: Group) -> None:
    """Rank 1 comes to the collective only after a large message from rank 0, which waits in that collective."""
    if world.rank == 0:
        send = everyone.isend(torch.ones(3_000_000), 1)
        everyone.barrier()
        send.wait()
    elif world.rank == 1:
        buffer = torch.empty(3_000_000)
        everyone.irecv(buffer, 0).wait()
        assert buffer.sum().item() == 3_000_000
        everyone.barrier()
    else:
        everyone.barrier()


def test_a_mailbox_keeps_the_order_of_each_sender(world: World) -> None:
    mailbox = world.mailbox("numbers")
    count = 50
    for number in range(count):
        for to in range(world.size):
            mailbox.send(to, f"{number}".encode() + b"." * (number * 997))
    received: dict[int, list[int]] = {rank: [] for rank in range(world.size)}
    for _ in range(count * world.size):
        source, payload = next_message(mailbox)
        received[source].append(int(payload.rstrip(b".")))
    assert all(numbers == list(range(count)) for numbers in received.values())
    assert mailbox.poll() is None
    mailbox.flush()


def test_ranks_that_flush_to_each_other_do_not_wait_for_ever(world: World) -> None:
    mailbox = world.mailbox("both ways")
    others = [rank for rank in range(world.size) if rank != world.rank]
    for number in range(3):
        for to in others:
            mailbox.send(to, bytes([number]) * 4_000_000)  # far more than MPI takes without its receiver
    mailbox.flush()
    received: dict[int, list[int]] = {rank: [] for rank in others}
    for _ in range(3 * len(others)):
        source, payload = next_message(mailbox)
        assert len(payload) == 4_000_000
        received[source].append(payload[0])
    assert all(numbers == [0, 1, 2] for numbers in received.values())


def test_sending_never_waits_for_the_receiver(world: World) -> None:
    mailbox = world.mailbox("large")
    payload = bytes(3_000_000)
    start = time.monotonic()
    if world.rank == 0:
        mailbox.send(1, payload)
        assert time.monotonic() - start < 0.5
        mailbox.send(1, b"")
        mailbox.flush()
    elif world.rank == 1:
        time.sleep(0.1)
        assert next_message(mailbox) == (0, payload)
        assert next_message(mailbox) == (0, b"")
    with pytest.raises(ValueError, match=f"there is no rank {world.size} in a world of {world.size}"):
        mailbox.send(world.size, b"")


def test_two_mailboxes_do_not_mix(world: World) -> None:
    first, second = world.mailbox("first"), world.mailbox("second")
    to = (world.rank + 1) % world.size
    second.send(to, b"second")
    first.send(to, b"first")
    assert next_message(first)[1] == b"first"
    assert next_message(second)[1] == b"second"
