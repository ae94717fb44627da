"""A model of random weights on one device, made there: no checkpoint is written, none is read, no MPI is started."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lepton_dist.bench.shapes import SHAPES, shape_config
from lepton_dist.comm.devices import Devices, see_gpus
from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import Links
from lepton_dist.coordinator.stage_cost import ModelCost
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.decode_graphs import DecodeGraphs, bucket_sizes, graph_problem
from lepton_dist.engine.kv_cache import KvCache
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.engine.runner import BegunStep, StageRunner
from lepton_dist.errors import LeptonError
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.held import HeldParameters
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.model.registry import read_model
from lepton_dist.parallel.requirements import is_norm
from lepton_dist.parallel.stage import ParallelStage, StageLink, build_stage
from lepton_dist.plan.devices import Binding
from lepton_dist.plan.placement import Seat, seats
from lepton_dist.plan.plan import Plan
from lepton_dist.plan.precision import Dtypes

BLOCK_TOKENS = 16
MAX_POSITIONS = 16384


@dataclass
class RandomModel:
    """A whole model on one device, and the runner of its steps."""

    config: ModelConfig
    runner: StageRunner
    notice: str
    cost: ModelCost
    seat: Seat

    @staticmethod
    def build(
        shape: str,
        device_name: str,
        *,
        num_blocks: int,
        most_sequences: int,
        context: int,
        dtype: torch.dtype = torch.bfloat16,
    ) -> RandomModel:
        """A model of a named shape on ``cuda`` or ``cpu``, all in `dtype`, with a KV cache of `num_blocks` blocks.

        Decode steps of up to `most_sequences` sequences of `context` tokens are captured where they can be; `notice`
        says why not.
        """
        devices = _devices(device_name)
        config, table, seat = _drawn(shape)
        alone = Group("alone", [0], 0, Links())
        link = StageLink(seat, {}, config.shape.hidden, dtype, devices.device)
        dtypes = Dtypes(*[str(dtype).removeprefix("torch.")] * 4)
        held = HeldParameters(dtypes.weights)
        for parameter in table.of_stage(seat.layers):
            extents = parameter.local_shape(seat.spans)
            if is_norm(parameter.name):
                held.take(parameter.name, torch.ones(extents, device=devices.device))
            else:
                values = torch.empty(extents, dtype=dtype, device=devices.device).normal_(std=0.02)
                held.take(parameter.name, values)
        stage = build_stage(seat, config, held, dtypes, alone, link, devices.device)
        geometry = KvGeometry(
            config.shape.num_layers, config.shape.num_kv_heads, config.shape.head_dim, BLOCK_TOKENS, dtype
        )
        cache = KvCache(geometry, num_blocks, devices.device)
        problem = graph_problem(stage, devices)
        graphs = None if problem else _captured(stage, cache, devices, most_sequences, context, config.shape.hidden)
        return RandomModel(
            config, StageRunner(stage, cache, devices, graphs), problem, ModelCost.of(config, dtypes), seat
        )

    def begin(self, batch: RunBatch) -> BegunStep:
        """Start one batch."""
        self.runner.expect(batch)
        begun = self.runner.begin(batch)
        assert begun is not None  # the only stage is the last
        return begun

    @property
    def matmul_weights(self) -> int:
        """Weights that a token is multiplied with, the head's included: all but the embedding's rows."""
        return len(self.seat.layers) * self.cost.layer_weights(self.seat) + self.head_weights

    @property
    def last_weights(self) -> int:
        """Those of them behind the last layer's keys and values, which only a prompt's last token meets."""
        return self.cost.last_weights(self.seat)

    @property
    def head_weights(self) -> int:
        """Weights of the head."""
        return self.cost.vocab_weights(self.seat)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return int(self.cost.kv_token_bytes(self.seat))


def _devices(name: str) -> Devices:
    patience = Patience(120.0, "measuring")
    if name == "cpu":
        return Devices.of(0, [Binding()], [see_gpus()], patience)
    sight = see_gpus()
    if not sight.gpus:
        raise LeptonError("no GPU is seen: check nvidia-smi, CUDA_VISIBLE_DEVICES, and that torch is a CUDA build")
    return Devices.of(0, [Binding(0, sight.gpus[0])], [sight], patience)


def _drawn(shape: str) -> tuple[ModelConfig, ParameterTable, Seat]:
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(shape_config(SHAPES[shape], MAX_POSITIONS))
        (Path(folder) / "config.json").write_text(text, encoding="utf-8")
        config, family = read_model(folder)
    plan = Plan.from_mesh().resolve(config.shape, 1)
    return config, ParameterTable(config, family, "model."), seats(plan, config.shape)[0]


def _captured(
    stage: ParallelStage, cache: KvCache, devices: Devices, most: int, context: int, hidden: int
) -> DecodeGraphs:
    graphs = DecodeGraphs(stage, cache, devices, bucket_sizes(most), -(-context // BLOCK_TOKENS), hidden)
    graphs.capture()
    return graphs
