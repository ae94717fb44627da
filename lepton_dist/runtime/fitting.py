"""How many blocks of KV cache fit beside the weights of each rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.errors import ConfigError
from lepton_dist.parallel.requirements import weight_bytes
from lepton_dist.plan.axes import span_size
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.blueprint import Blueprint


def num_blocks(blueprint: Blueprint, geometry: KvGeometry, budget_bytes: int, *, is_left: bool = False) -> int:
    """Blocks of this rank's KV cache: as the plan says, or what the sequences need within half of the rank's memory.

    With `is_left` the budget is what a measurement has left for it, and all of it may be taken.

    Raises:
        ConfigError: there is not room for one block, or for as many bytes as the plan asks for.
    """
    asked = blueprint.limits.kv_cache_bytes
    if is_left and asked != "auto" and asked > budget_bytes:
        raise ConfigError(f"{asked} bytes are asked for, but {budget_bytes} are left", key="engine.kv_cache_bytes")
    limit = (budget_bytes if is_left else budget_bytes // 2) if asked == "auto" else asked
    count = min(limit // geometry.block_bytes, blueprint.most_blocks())
    if count < 1:
        raise ConfigError(
            f"{limit} bytes do not hold one block of {geometry.block_bytes} bytes ({geometry.block_tokens} tokens)",
            key="engine.kv_cache_bytes",
        )
    return count


class Fitting:
    """What fits each rank of a plan. Seats that hold as much are looked at once: of thousands few are unlike."""

    def __init__(self, blueprint: Blueprint, dtypes: Dtypes) -> None:
        self._blueprint, self._dtypes = blueprint, dtypes
        self._kv_dtype = getattr(torch, dtypes.kv_cache)
        self._weight_bytes: dict[object, int] = {}

    def weight_bytes(self, seat: Seat) -> int:
        """Bytes of a seat's weights."""
        shape = seat.layers, tuple((axis, span_size(spans)) for axis, spans in seat.spans.items())
        if shape not in self._weight_bytes:
            self._weight_bytes[shape] = weight_bytes(self._blueprint.table, seat, self._dtypes)
        return self._weight_bytes[shape]

    def blocks(self, seat: Seat, budget_bytes: int, host: str, *, is_gpu: bool = False) -> int:
        """`num_blocks` of a seat that has `budget_bytes` of memory on `host`, its weights included.

        On a GPU, `is_gpu`, it is known for certain only after a rehearsal, which finds less if there is less.

        Raises:
            ConfigError: weights and KV cache do not fit.
        """
        blueprint, needed = self._blueprint, self.weight_bytes(seat)
        geometry = blueprint.geometry(seat, self._kv_dtype)
        place = f"replicas[{seat.replica}].stages[{seat.stage}]"
        if is_gpu and needed > budget_bytes:
            raise ConfigError(
                f"rank {seat.rank} on {host} needs {needed} bytes for weights, but its GPU has {budget_bytes} free for "
                "it: use more GPUs, or smaller weights (precision.weights)",
                key=place,
            )
        if is_gpu:
            return num_blocks(blueprint, geometry, budget_bytes - needed, is_left=True)
        blocks = num_blocks(blueprint, geometry, budget_bytes)
        if needed + blocks * geometry.block_bytes > budget_bytes:
            is_asked = blueprint.limits.kv_cache_bytes != "auto"
            raise ConfigError(
                f"rank {seat.rank} on {host} needs {needed} bytes for weights and {blocks * geometry.block_bytes} for "
                f"the KV cache, but may use {budget_bytes}: use more ranks, or a smaller engine.kv_cache_bytes",
                key="engine.kv_cache_bytes" if is_asked else place,
            )
        return blocks

    def left(self, rooms: Mapping[int, int], hosts: Sequence[str], fitting: Mapping[int, int]) -> dict[int, int]:
        """`fitting` with the blocks of the GPU ranks, whose `rooms` for the KV cache were measured, put right.

        Raises:
            ConfigError: a GPU has no room for the KV cache.
        """
        blueprint, result = self._blueprint, dict(fitting)
        for rank, room in rooms.items():
            geometry = blueprint.geometry(blueprint.seats[rank], self._kv_dtype)
            try:
                result[rank] = num_blocks(blueprint, geometry, max(room, 0), is_left=True)
            except ConfigError as error:
                raise ConfigError(
                    f"rank {rank} on {hosts[rank]}: with its weights loaded and the largest step rehearsed, its GPU "
                    f"has {max(room, 0)} bytes left: {error.message}; lower engine.max_batch_tokens, "
                    "engine.max_sequences or engine.context_tokens, or use more GPUs",
                    key=error.key,
                ) from None
        return result
