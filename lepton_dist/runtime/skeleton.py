"""A decoder whose matmuls cost nothing: what remains of a step is the overhead that the cost model adds to them.

Everything else is the engine's own: batches, layout, norms, rope, attention through the paged cache, sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lepton_dist.comm.group import Group
from lepton_dist.config.sampling import SamplingParams
from lepton_dist.engine.batch import RunBatch, make_batch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.kv_cache import CachedAttention, KvCache, lay_out
from lepton_dist.engine.kv_geometry import KvGeometry
from lepton_dist.engine.request import Request, Scanner, Sequence
from lepton_dist.engine.runner import StageRunner, StepResult
from lepton_dist.engine.scheduler import Chunk
from lepton_dist.kernels.activations import ACTIVATIONS
from lepton_dist.kernels.cpu.matmul import native_product
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.structures import MatmulCall
from lepton_dist.model.config import RopeConfig
from lepton_dist.model.decoder import Decoder, Head
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.model.layers import Attention, Embedding, Linear, Mlp, Norm
from lepton_dist.model.rope import RopeTables
from lepton_dist.parallel.stage import ParallelStage, StageLink
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.placement import seats
from lepton_dist.plan.plan import EngineLimits, Plan, Replica, Stage

BLOCK_TOKENS = 16
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 1024, 16, 4, 64, 4096
_DTYPE = torch.bfloat16


class FreeWeight:
    """A matrix [out, in] whose products lie ready, or are zeros where a compiled layer asks for them."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features, self.in_features = out_features, in_features
        self._call = MatmulCall(in_=in_features, out=out_features)
        library = native_library()
        self.native = None if library is None else native_product(library.lepton_matmul_nothing, self._call)
        self._products: dict[int, torch.Tensor] = {}

    def matmul(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[tokens, in] -> [tokens, out], the same for every input."""
        product = self._products.get(x.shape[0])
        if product is None:
            random = torch.randn(x.shape[0], self.out_features)
            product = self._products[x.shape[0]] = random.to(dtype or _DTYPE)
        return product


@dataclass
class Skeleton:
    """A stage of one rank: all of a model of `num_layers` layers and `vocab` logits."""

    runner: StageRunner
    cache: KvCache

    @staticmethod
    def build(alone: Group, num_layers: int, vocab: int, num_blocks: int) -> Skeleton:
        """`alone` is a group of this rank only."""
        shape = ModelShape(num_layers, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, vocab)
        replica = Replica((Stage((0,)),))
        plan = Plan(replicas=(replica,)).resolve(shape, 1)
        seat = seats(plan, shape)[0]
        decoder = Decoder(
            embedding=Embedding(torch.randn(vocab, HIDDEN).to(_DTYPE), 0, None, _same),
            layers=[_layer() for _ in range(num_layers)],
            head=Head(_norm(HIDDEN), Linear(FreeWeight(vocab, HIDDEN), None, _same)),
            rope=RopeTables(RopeConfig(theta=10000.0, dim=HEAD_DIM), 8192),
        )
        link = StageLink(seat, {}, HIDDEN, _DTYPE)
        cache = KvCache(KvGeometry(num_layers, KV_HEADS, HEAD_DIM, BLOCK_TOKENS, _DTYPE), num_blocks)
        return Skeleton(StageRunner(ParallelStage(seat, decoder, alone, link, 0, vocab), cache), cache)

    def step(self, batch: RunBatch) -> None:
        """Run one batch."""
        self.runner.expect(batch)
        self.runner.run(batch)

    def attend(self, batch: RunBatch, layer: int) -> None:
        """Attention alone, of one layer."""
        paged = lay_out(batch, BLOCK_TOKENS).paged(torch.device("cpu"))
        turned = torch.ones(batch.num_tokens, HEADS + KV_HEADS, HEAD_DIM, dtype=_DTYPE)
        value = torch.ones(batch.num_tokens, KV_HEADS, HEAD_DIM, dtype=_DTYPE)
        CachedAttention(self.cache, paged)(layer, turned, value, None, None)


def _layer() -> DecoderLayer:
    def linear(out_features: int, in_features: int) -> Linear:
        return Linear(FreeWeight(out_features, in_features), None, _same)

    attention = Attention(
        qkv=linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        q_norm=None,
        k_norm=None,
        output=linear(HIDDEN, HEADS * HEAD_DIM),
        head_dim=HEAD_DIM,
        window=None,
    )
    mlp = Mlp(linear(2 * FFN, HIDDEN), linear(HIDDEN, FFN), ACTIVATIONS["silu"], is_gated=True)
    return make_layer(_norm(HIDDEN), attention, _norm(HIDDEN), mlp, HEAD_DIM)


def _norm(size: int) -> Norm:
    return Norm(torch.ones(size), None, 1e-5, _DTYPE)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def decode_batch(count: int, context: int) -> RunBatch:
    """One new token for each of `count` sequences of `context` tokens, in blocks of their own."""
    blocks = -(-context // BLOCK_TOKENS)
    return make_batch(0, [_chunk(index, context - 1, 1, index * blocks) for index in range(count)])


def prefill_batch(count: int) -> RunBatch:
    """One prompt of `count` tokens."""
    return make_batch(0, [_chunk(0, 0, count, 0)])


def _chunk(index: int, start: int, count: int, first_block: int) -> Chunk:
    sequence = Sequence(_request(index, start + count), 0, index)
    sequence.block_table.extend(range(first_block, first_block + -(-(start + count) // BLOCK_TOKENS)))
    return Chunk(sequence, start, count, samples=True, scores_prompt=False)


def _request(index: int, prompt: int, output: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, seed=0)
    return Request(str(index), [1] * prompt, sampling)


class EngineLoop:
    """The leader's own work of a step, without any model: `count` sequences that decode on and on."""

    def __init__(self, count: int) -> None:
        limits = EngineLimits(max_sequences=count, prefix_cache=False)
        self._engine = Engine(limits, 64 * count, 1, (), _no_scanner)
        for index in range(count):
            self._engine.add(_request(index, 1, 900))
        self.step()

    def step(self) -> None:
        """Schedule a batch, and take in its tokens."""
        batch = self._engine.next_batch()
        if batch is None:
            raise ValueError("the sequences of an engine loop have all come to their end")
        tokens = torch.ones(batch.num_tokens, dtype=torch.int32).numpy().tobytes()
        self._engine.apply(StepResult(batch.step, tokens, {}, []))


def _no_scanner(stops: tuple[str, ...], _preceding: list[int]) -> Scanner:
    raise ValueError(f"no request of an engine loop has stop strings, but these came: {stops}")
