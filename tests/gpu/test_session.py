"""A session on a GPU: its KV cache, its errors, and captured steps that say what eager ones say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lepton_dist.bench.gpu_model import BLOCK_TOKENS, RandomModel
from lepton_dist.comm.world import open_world
from lepton_dist.errors import ConfigError
from lepton_dist.plan.document import parse_plan
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.opening import ModelRequest, open_model
from lepton_dist.runtime.skeleton import decode_batch, prefill_batch

TINY = Path(__file__).parents[2] / "configs" / "examples" / "tiny-stdlib"


def opened(plan: str) -> Controller:
    controller = Controller(open_world())
    open_model(controller, ModelRequest(str(TINY), parse_plan(plan)))
    return controller


def test_the_cache_is_on_the_gpu_and_leaves_room() -> None:
    controller = opened("mesh: {tp: 1}\ndevice: cuda")
    ready = controller.ready[0]
    free, _ = torch.cuda.mem_get_info()
    assert ready.device.startswith("cuda:0") and ready.num_blocks > 0 and free > 0
    assert not ready.notices, ready.notices
    controller.close()


def test_auto_takes_the_gpu() -> None:
    controller = opened("mesh: {tp: 1}\ndevice: auto")
    assert controller.ready[0].device.startswith("cuda:0")
    controller.close()


def test_a_cache_that_does_not_fit_is_told() -> None:
    with pytest.raises(ConfigError, match="bytes are asked for, but"):
        opened("mesh: {tp: 1}\ndevice: cuda\nengine: {kv_cache_bytes: 100TiB}")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_captured_steps_equal_eager_ones(count: int) -> None:
    context = 200
    blocks = count * -(-context // BLOCK_TOKENS)
    torch.manual_seed(3)
    model = RandomModel.build("tiny", "cuda", num_blocks=blocks, most_sequences=8, context=context)
    assert not model.notice
    model.begin(prefill_batch(context)).result()
    batch = decode_batch(count, context)
    captured = [model.begin(batch).result().tokens for _ in range(2)]
    graphs, model.runner._graphs = model.runner._graphs, None
    eager = model.begin(batch).result().tokens
    assert graphs is not None and captured == [eager, eager]
