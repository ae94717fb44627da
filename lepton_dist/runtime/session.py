"""A session: one model under one plan, from its opening on every rank to its close."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from lepton_dist.comm.calibrate import calibrate
from lepton_dist.comm.world import World
from lepton_dist.config.machine import affinity_mask, asked_threads, available_bytes, fair_threads
from lepton_dist.engine.kv_cache import KvCache, KvGeometry
from lepton_dist.engine.runner import StageRunner
from lepton_dist.errors import ConfigError
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.model.registry import read_model
from lepton_dist.parallel.load import load_seat
from lepton_dist.parallel.requirements import kv_heads_of, parameter_table, weight_bytes
from lepton_dist.parallel.stage import StageLink, build_stage, stage_group
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.placement import Seat, seats
from lepton_dist.plan.plan import EngineLimits, Plan, Replica
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.messages import OpenSession, SessionReady
from lepton_dist.storage.index import CheckpointIndex


@dataclass(frozen=True)
class Blueprint:
    """What follows from a model directory and a resolved plan, without any communication."""

    config: ModelConfig
    index: CheckpointIndex
    table: ParameterTable
    plan: Plan

    @staticmethod
    def draw(model: str, plan: Plan, world_size: int) -> Blueprint:
        """Read a checkpoint's headers and fit the plan to it.

        Raises:
            CheckpointError: the checkpoint is incomplete or unknown.
            ConfigError: the plan does not fit the model or the world.
        """
        config, family = read_model(model)
        index = CheckpointIndex.read(model)
        return Blueprint(config, index, parameter_table(index, config, family), plan.resolve(config.shape, world_size))

    @cached_property
    def seats(self) -> Mapping[int, Seat]:
        """The seat of every rank that the plan uses."""
        return seats(self.plan, self.config.shape)

    @property
    def limits(self) -> EngineLimits:
        """The engine's limits."""
        return self.plan.engine

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and output together."""
        asked = self.plan.engine.context_tokens
        return self.config.max_positions if asked == "auto" else min(asked, self.config.max_positions)

    def geometry(self, seat: Seat, dtype: torch.dtype) -> KvGeometry:
        """The shape of a seat's KV cache, whose values are of `dtype`."""
        shape = self.config.shape
        return KvGeometry(len(seat.layers), kv_heads_of(seat), shape.head_dim, self.limits.block_tokens, dtype)

    def most_blocks(self) -> int:
        """Blocks that `max_sequences` sequences at the full context take."""
        return self.limits.max_sequences * -(-self.context_tokens // self.limits.block_tokens)


def num_blocks(blueprint: Blueprint, geometry: KvGeometry, budget_bytes: int) -> int:
    """Blocks of this rank's KV cache: as the plan says, or what the sequences need within half of the rank's memory.

    Raises:
        ConfigError: there is not room for one block.
    """
    asked = blueprint.limits.kv_cache_bytes
    limit = budget_bytes // 2 if asked == "auto" else asked
    count = min(limit // geometry.block_bytes, blueprint.most_blocks())
    if count < 1:
        raise ConfigError(
            f"{limit} bytes do not hold one block of {geometry.block_bytes} bytes ({geometry.block_tokens} tokens)",
            key="engine.kv_cache_bytes",
        )
    return count


def fitting_blocks(blueprint: Blueprint, seat: Seat, dtypes: Dtypes, budget_bytes: int, host: str) -> int:
    """`num_blocks` of a seat that has `budget_bytes` of memory on `host`, its weights included.

    Raises:
        ConfigError: weights and KV cache do not fit.
    """
    geometry = blueprint.geometry(seat, getattr(torch, dtypes.kv_cache))
    blocks = num_blocks(blueprint, geometry, budget_bytes)
    needed = weight_bytes(blueprint.table, seat, dtypes)
    if needed + blocks * geometry.block_bytes > budget_bytes:
        is_asked = blueprint.limits.kv_cache_bytes != "auto"
        raise ConfigError(
            f"rank {seat.rank} on {host} needs {needed} bytes for weights and {blocks * geometry.block_bytes} for the "
            f"KV cache, but may use {budget_bytes}: use more ranks, or a smaller engine.kv_cache_bytes",
            key="engine.kv_cache_bytes" if is_asked else f"replicas[{seat.replica}].stages[{seat.stage}]",
        )
    return blocks


@dataclass
class Session:
    """What a rank holds while a session is open."""

    blueprint: Blueprint
    seat: Seat
    replica: Replica
    runner: StageRunner
    ready: SessionReady


def open_session(world: World, order: OpenSession) -> tuple[Session | None, SessionReady]:
    """Load this rank's shard and connect it to the others; collective over the world.

    Raises:
        CheckpointError: a weight file cannot be read.
        ConfigError: weights and KV cache do not fit the memory of a rank; every rank raises the same.
    """
    budgets = _meet_machines(world, order.threads)
    threads = torch.get_num_threads()
    blueprint = Blueprint.draw(order.model, parse_plan(order.plan), world.size)
    dtypes = Dtypes(order.weights, order.kv_cache, order.wire, order.compute)
    compute: torch.dtype = getattr(torch, dtypes.compute)
    # Every rank asks for all of them, so that either all go on or none does.
    fitting = {
        rank: fitting_blocks(blueprint, seat, dtypes, budgets[rank], world.hosts[rank])
        for rank, seat in sorted(blueprint.seats.items())
    }
    seat = blueprint.seats.get(world.rank)
    if seat is None:
        return None, SessionReady(world.rank, threads=threads)
    replica = blueprint.plan.replicas[seat.replica]
    blocks = min(fitting[rank] for rank in replica.ranks)
    geometry = blueprint.geometry(seat, getattr(torch, dtypes.kv_cache))
    tensors = load_seat(world, blueprint.index, blueprint.table, blueprint.seats, compute)
    group = world.group(replica.ranks, f"replica{seat.replica}")
    link = StageLink(replica, seat, group, blueprint.config.shape.hidden, getattr(torch, dtypes.wire))
    tp = stage_group(world, replica, seat, "tp")
    calibrate(tp)
    stage = build_stage(seat, blueprint.config, tensors, dtypes, tp, link)
    cache = KvCache(geometry, blocks)
    _return_free_memory()
    held = weight_bytes(blueprint.table, seat, dtypes)
    ready = SessionReady(world.rank, blocks, blocks * geometry.block_bytes, held, threads)
    return Session(blueprint, seat, replica, StageRunner(stage, cache), ready), ready


def _meet_machines(world: World, asked: int) -> list[int]:
    """The bytes of memory that each rank may use, found before any of them takes some.

    Sets the threads of this rank's kernels too: as asked, or by the job, or its fair share of the node's cores.
    """
    mine = [available_bytes(world.nodes.count(world.nodes[world.rank])), *affinity_mask()]
    rows = world.group(range(world.size), "machines").all_gather(torch.tensor(mine)).tolist()
    masks = [rows[rank][1:] for rank in range(world.size) if world.nodes[rank] == world.nodes[world.rank]]
    torch.set_num_threads(asked or asked_threads() or fair_threads(masks, world.local_rank))
    return [row[0] for row in rows]


def _return_free_memory() -> None:
    """Hand what loading freed back to the system, where the C library can: glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
