"""The KV cache of a GPU: the arithmetic, the steps that are rehearsed, and the errors of what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lepton_dist.engine.batch import read_spans
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.errors import ConfigError
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.plan import EngineLimits
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.fitting import Fitting, num_blocks
from lepton_dist.runtime.gpu_memory import kv_room_bytes, rehearsals

GIB = 1 << 30
TINY = Path(__file__).parents[3] / "configs" / "examples" / "tiny-stdlib"


def test_room_is_what_is_left_of_this_ranks_share() -> None:
    facts: dict[str, Any] = {"free": 120 * GIB, "total": 140 * GIB, "peak": GIB}
    spare = 140 * GIB // 50
    assert kv_room_bytes(**facts, sharers=1) == 120 * GIB - spare - GIB
    assert kv_room_bytes(**facts, sharers=2) == (120 * GIB - spare) // 2 - GIB
    assert kv_room_bytes(free=GIB, total=8 * GIB, peak=GIB, sharers=1) < 0


def test_the_rehearsed_steps_are_the_largest_there_are() -> None:
    limits = EngineLimits(block_tokens=16, max_batch_tokens=64, max_sequences=8)
    prompt, decodes = rehearsals(limits, context_tokens=200, num_blocks=5)
    assert read_spans(prompt)[:, :4].tolist() == [[0, 64, 200, 13]]
    assert read_spans(decodes)[:, 1].tolist() == [1] * 8 and set(read_spans(decodes)[:, 2].tolist()) == {200}
    assert max(torch.frombuffer(bytearray(prompt.block_tables), dtype=torch.int32).tolist()) == 4
    short, _ = rehearsals(limits, context_tokens=40, num_blocks=5)
    assert read_spans(short)[:, 1:3].tolist() == [[40, 40]]


def blueprint(**limits: Any) -> Blueprint:
    drawn = Blueprint.draw(str(TINY), parse_plan("mesh: {tp: 1}\ndevice: cuda"), 1)
    return replace(drawn, plan=replace(drawn.plan, engine=replace(drawn.plan.engine, **limits)))


def test_blocks_take_all_that_is_left_up_to_what_sequences_need() -> None:
    drawn = blueprint(max_sequences=2)
    geometry = drawn.geometry(drawn.seats[0], torch.bfloat16)
    assert num_blocks(drawn, geometry, 10 * geometry.block_bytes, is_left=True) == 10
    assert num_blocks(drawn, geometry, 10 * geometry.block_bytes) == 5
    assert num_blocks(drawn, geometry, 1 << 50, is_left=True) == drawn.most_blocks()


def test_a_model_that_does_not_fit_its_gpu_is_told_with_both_numbers() -> None:
    drawn = blueprint()
    dtypes = decide_dtypes(drawn.plan.precision, None, drawn.config.dtype)
    with pytest.raises(ConfigError, match=r"rank 0 on a needs \d+ bytes for weights, but its GPU has 1000 free for it"):
        Fitting(drawn, dtypes).blocks(drawn.seats[0], 1000, "a", is_gpu=True)


@pytest.mark.parametrize(
    ("asked", "room", "message"),
    [
        ("auto", -5, "its GPU has 0 bytes left: 0 bytes do not hold one block"),
        (10 * GIB, GIB, f"its GPU has {GIB} bytes left: {10 * GIB} bytes are asked for, but {GIB} are left"),
    ],
)
def test_a_cache_that_does_not_fit_says_what_to_lower(asked: Any, room: int, message: str) -> None:
    drawn = blueprint(kv_cache_bytes=asked)
    dtypes = decide_dtypes(drawn.plan.precision, None, drawn.config.dtype)
    with pytest.raises(ConfigError) as caught:
        Fitting(drawn, dtypes).left({0: room}, ["a"], {0: 7})
    assert message in str(caught.value) and "lower engine.max_batch_tokens" in str(caught.value)
    assert caught.value.key == "engine.kv_cache_bytes"


def test_ranks_on_cpus_keep_what_they_had() -> None:
    drawn = blueprint()
    dtypes = decide_dtypes(drawn.plan.precision, None, drawn.config.dtype)
    assert Fitting(drawn, dtypes).left({}, ["a"], {0: 7}) == {0: 7}


def test_float16_is_kept_where_every_stage_is_on_gpus() -> None:
    precision = parse_plan("mesh: {tp: 1}").precision
    assert decide_dtypes(precision, "float16", "bfloat16", has_float16=True).weights == "float16"
    cpu = decide_dtypes(precision, "float16", "bfloat16")
    assert cpu.weights == "float32" and "device: cuda" in cpu.notice


def test_graphs_are_refused_with_the_reason() -> None:
    from lepton_dist.engine.decode_graphs import graph_problem

    def problem(device: str, transport: str | None, size: int = 2) -> str:
        tp = SimpleNamespace(size=size, gpu_transport=transport, num_nodes=1)
        stage = SimpleNamespace(tp=tp, link=SimpleNamespace(dtype=torch.bfloat16))
        return graph_problem(cast(Any, stage), cast(Any, SimpleNamespace(device=torch.device(device))))

    assert problem("cpu", None) == "it computes on a CPU"
    assert problem("cuda", "staged") == "its sums go over staged, which waits for the GPU"
    if not torch.cuda.is_available():
        assert "there is no GPU" in problem("cuda", "nccl")


def test_a_block_of_the_cache_is_spare_only_on_gpus() -> None:
    from lepton_dist.engine.kv_cache import KvCache

    geometry = KvGeometry(1, 2, 8, 4, torch.float32)
    cache = KvCache(geometry, 3)
    assert cache.num_blocks == 3 and cache.spare_slot == 12 and cache._keys[0].shape[0] == 3
