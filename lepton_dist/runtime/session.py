"""A session: one model under one plan, from its opening on every rank to its close."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from lepton_dist.comm.calibrate import calibrate
from lepton_dist.comm.devices import Devices, pack_sight, see_gpus, unpack_sight
from lepton_dist.comm.group import Group
from lepton_dist.comm.world import World
from lepton_dist.config.machine import affinity_mask, asked_threads, available_bytes, fair_threads, useful_threads
from lepton_dist.engine.decode_graphs import DecodeGraphs, bucket_sizes, graph_problem
from lepton_dist.engine.kv_cache import KvCache
from lepton_dist.engine.runner import StageRunner
from lepton_dist.errors import LeptonError
from lepton_dist.kernels.cpu.native import native_problem
from lepton_dist.parallel.checkpoint import Checkpoint
from lepton_dist.parallel.load import load_seat
from lepton_dist.parallel.stage import ParallelStage, StageLink, build_stage, open_hops, stage_group
from lepton_dist.plan.devices import Binding, Sight, place_ranks
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.plan import Plan, Replica
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.fitting import Fitting
from lepton_dist.runtime.gpu_memory import Rehearsed, free_bytes, kv_room_bytes, rehearse
from lepton_dist.runtime.head_start import head_start
from lepton_dist.runtime.messages import OpenSession, SessionReady


@dataclass
class Session:
    """What a rank holds while a session is open. `ahead`: steps that its leader orders before a result is back."""

    blueprint: Blueprint
    seat: Seat
    replica: Replica
    runner: StageRunner
    ready: SessionReady
    ahead: int

    def close(self) -> None:
        """Let go of what must go before the groups do."""
        self.runner.close()


def open_session(world: World, order: OpenSession, plan: Plan) -> tuple[Session | None, SessionReady]:
    """Load this rank's shard under the order's `plan` and connect it to the others; collective over the world.

    Raises:
        CheckpointError: a weight file cannot be read.
        ConfigError: devices, weights or KV cache do not fit the machines; every rank raises the same.
        LeptonError: a GPU's memory ran out where it should have sufficed.
    """
    machines = _meet_machines(world, order.threads, plan)
    threads = torch.get_num_threads()
    blueprint = Blueprint.draw(order.model, plan, world.size, _told_checkpoint(machines.everyone, order))
    dtypes = Dtypes(order.weights, order.kv_cache, order.wire, order.compute)
    devices = _take_devices(world, blueprint, machines.sights)
    bindings = devices.bindings
    has_gpus = any(binding.is_gpu for binding in bindings)
    budgets = _budgets(machines, devices) if has_gpus else machines.budgets
    # Every rank asks for all of them, so that either all go on or none does.
    fit = Fitting(blueprint, dtypes)
    fitting = {
        rank: fit.blocks(seat, budgets[rank], world.hosts[rank], is_gpu=bindings[rank].is_gpu)
        for rank, seat in sorted(blueprint.seats.items())
    }
    seat = blueprint.seats.get(world.rank)
    opening = None if seat is None else _Opening(world, blueprint, dtypes, devices, seat)
    stage = None if opening is None else opening.stage(fitting)
    if has_gpus:
        # Each GPU is measured when all that share it hold their weights, and before any takes its cache.
        peak = 0 if opening is None or stage is None else opening.rehearse(stage)
        rooms = _measured_rooms(machines.everyone, devices, peak, bindings[world.rank].sharers)
        gpu_rooms = {rank: rooms[rank] for rank in blueprint.seats if bindings[rank].is_gpu}
        fitting = fit.left(gpu_rooms, world.hosts, fitting)
    if opening is None or stage is None or seat is None:
        return None, SessionReady(world.rank, threads=threads)
    blocks = min(fitting[rank] for rank in opening.replica.ranks)
    runner, notices = opening.runner(stage, blocks)
    geometry = opening.geometry
    _return_free_memory()
    held = fit.weight_bytes(seat)
    ready = SessionReady(
        world.rank,
        blocks,
        blocks * geometry.block_bytes,
        held,
        threads,
        device=_device_name(devices.device),
        notices=[*filter(None, [machines.warning]), *notices],
    )
    # A GPU is to have the next step before it ends this one; on a CPU a step is over when the call is.
    ahead = int(devices.device.type == "cuda" and len(opening.replica.stages) == 1)
    return Session(blueprint, seat, opening.replica, runner, ready, ahead), ready


class _Opening:
    """The steps by which one seat comes to its runner."""

    def __init__(self, world: World, blueprint: Blueprint, dtypes: Dtypes, devices: Devices, seat: Seat) -> None:
        self._world, self._blueprint, self._dtypes = world, blueprint, dtypes
        self._devices, self._seat = devices, seat
        self.replica = blueprint.plan.replicas[seat.replica]
        self.geometry = blueprint.geometry(seat, getattr(torch, dtypes.kv_cache))

    def stage(self, fitting: Mapping[int, int]) -> ParallelStage:
        """Load the shard and open the groups; `fitting` are the blocks of each rank's KV cache, at most."""
        blueprint, seat, world, device = self._blueprint, self._seat, self._world, self._devices.device
        with self._told_of_memory("its weights"):
            begun = head_start().take()
            held = load_seat(world, blueprint.index, blueprint.table, blueprint.seats, self._dtypes, device, begun)
        groups = open_hops(world, self.replica, seat, self._devices)
        link = StageLink(seat, groups, blueprint.config.shape.hidden, getattr(torch, self._dtypes.wire), device)
        tp = self._devices.serve(stage_group(world, self.replica, seat, "tp"))
        calibrate(tp)
        with self._told_of_memory("its weights"):
            overlaps = blueprint.limits.overlap and world.serves_any_thread
            # No sequence outgrows the cache, however long a context the checkpoint promises.
            most = min(fitting[rank] for rank in self.replica.ranks) * blueprint.limits.block_tokens
            positions = min(blueprint.context_tokens, most)
            return build_stage(
                seat, blueprint.config, held, self._dtypes, tp, link, device, overlaps=overlaps, positions=positions
            )

    def rehearse(self, stage: ParallelStage) -> int:
        """The bytes that steps take at most on this rank's GPU; 0 on a CPU."""
        if self._devices.device.type == "cpu":
            return 0
        blueprint = self._blueprint
        size = Rehearsed(blueprint.limits, blueprint.context_tokens, blueprint.config.shape.hidden)
        with self._told_of_memory(
            f"a step of engine.max_batch_tokens {blueprint.limits.batch_tokens()} and engine.max_sequences "
            f"{blueprint.limits.max_sequences}"
        ):
            peak = rehearse(stage, self.geometry, size, self._devices)
        # Captured steps keep memory of their own, beside that of the others.
        return peak if graph_problem(stage, self._devices) else 2 * peak

    def runner(self, stage: ParallelStage, blocks: int) -> tuple[StageRunner, list[str]]:
        """The runner over a cache of so many blocks, with its decode steps captured where they can be; and notices."""
        devices, blueprint = self._devices, self._blueprint
        with self._told_of_memory(f"a KV cache of {blocks * self.geometry.block_bytes} bytes"):
            cache = KvCache(self.geometry, blocks, devices.device)
        if devices.device.type == "cpu":
            return StageRunner(stage, cache), [problem] if (problem := native_problem()) else []
        problem = graph_problem(stage, devices)
        if problem:
            return StageRunner(stage, cache, devices), [f"decode steps run without CUDA graphs: {problem}"]
        limits = blueprint.limits
        most = min(limits.max_sequences, limits.batch_tokens())
        max_blocks = -(-blueprint.context_tokens // limits.block_tokens)
        hidden = blueprint.config.shape.hidden
        graphs = DecodeGraphs(stage, cache, devices, bucket_sizes(most), max_blocks, hidden)
        with self._told_of_memory("captured decode steps"):
            graphs.capture()
        return StageRunner(stage, cache, devices, graphs), []

    @contextmanager
    def _told_of_memory(self, what: str) -> Iterator[None]:
        """Say what a GPU's memory did not suffice for."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            rank = self._world.rank
            raise LeptonError(
                f"rank {rank} on {self._world.hosts[rank]}: {self._devices.device} has no memory for {what}: use more "
                f"GPUs, smaller engine limits or weights, or see who else computes there ({error})"
            ) from None


@dataclass(frozen=True)
class _Machines:
    """What the ranks found out about one another: bytes of memory that each may use, and the GPUs that each sees.

    `warning` is of this rank's threads, or empty.
    """

    everyone: Group
    budgets: list[int]
    sights: list[Sight]
    warning: str


def _meet_machines(world: World, asked: int, plan: Plan) -> _Machines:
    """What each rank may use, found before any of them takes some.

    Sets the threads of this rank's kernels too: as asked, or by the job, or its fair share of the node's cores, which
    ranks that the plan leaves out have no part in.
    """
    mask = affinity_mask()
    sight = pack_sight(see_gpus() if plan.wants_gpus else Sight())
    room = available_bytes(world.nodes.count(world.nodes[world.rank])) + head_start().held_bytes
    mine = [room, *mask, *sight]
    everyone = world.group(range(world.size), "machines")
    rows = everyone.all_gather(torch.tensor(mine)).tolist()
    end = 1 + len(mask)
    here = world.nodes[world.rank]
    at_work = [rank for rank in range(world.size) if world.nodes[rank] == here and rank in {*plan.ranks, world.rank}]
    share = fair_threads([rows[rank][1:end] for rank in at_work], at_work.index(world.rank))
    threads, warning = useful_threads(asked or asked_threads() or share, share)
    torch.set_num_threads(threads)
    return _Machines(everyone, [row[0] for row in rows], [unpack_sight(row[end:]) for row in rows], warning)


def _told_checkpoint(everyone: Group, order: OpenSession) -> Checkpoint:
    """What rank 0 has read of the model, so that no other rank opens its small files and headers. Collective."""
    length = everyone.broadcast(torch.tensor([len(order.checkpoint)]))
    packed = torch.empty(int(length), dtype=torch.int8)
    if order.checkpoint:
        packed.numpy()[:] = np.frombuffer(order.checkpoint, np.int8)
    return Checkpoint.unpacked(order.model, everyone.broadcast(packed).numpy().tobytes())


def _take_devices(world: World, blueprint: Blueprint, sights: Sequence[Sight]) -> Devices:
    """Where every rank computes, by the plan; this one takes its GPU if it has one."""
    placed = place_ranks(blueprint.plan, world.nodes, sights)
    bindings = [placed.get(rank, Binding()) for rank in range(world.size)]
    return Devices.of(world.rank, bindings, sights, world.patience)


def _budgets(machines: _Machines, devices: Devices) -> list[int]:
    """Bytes that each rank may use of where it computes: a GPU's free memory is shared evenly by its ranks."""
    free = free_bytes(devices.device)[0] if devices.device.type == "cuda" else 0
    shares = machines.everyone.all_gather(torch.tensor([free])).flatten().tolist()
    return [
        shares[rank] // binding.sharers if binding.is_gpu else machines.budgets[rank]
        for rank, binding in enumerate(devices.bindings)
    ]


def _measured_rooms(everyone: Group, devices: Devices, peak: int, sharers: int) -> list[int]:
    """What every rank's GPU has left for its KV cache; 0 for ranks on CPUs. Collective over the world."""
    if devices.device.type == "cuda":
        torch.cuda.empty_cache()
    everyone.barrier()
    room = 0
    if devices.device.type == "cuda":
        free, total = free_bytes(devices.device)
        room = kv_room_bytes(free=free, total=total, peak=peak, sharers=sharers)
    rooms: list[int] = everyone.all_gather(torch.tensor([room])).flatten().tolist()
    return rooms


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def _return_free_memory() -> None:
    """Hand what loading freed back to the system, where the C library can: glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
