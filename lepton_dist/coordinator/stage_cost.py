"""What one stage of a plan costs: bytes and flops counted from the seats that its ranks hold. Pure.

The equations and their sources are in docs/decisions/006-cost-model.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lepton_dist.coordinator.cluster import Cluster, RankProfile
from lepton_dist.engine.work import StepWork
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.parameters import matrix_kind
from lepton_dist.plan.axes import Axis, ModelShape, span_size
from lepton_dist.plan.crossing import OVERLAP_ROWS
from lepton_dist.plan.placement import Seat
from lepton_dist.plan.precision import INT4_GROUPS, Dtypes

TERMS = ("weights", "matmul", "attention", "collectives", "transfers", "overhead")
# Bytes of a value: 4-bit weights have a 16-bit scale for each group, an int8 wire for each group of 64.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0}
WEIGHT_BYTES |= {kind: 0.5 + 2 / group for kind, group in INT4_GROUPS.items()}
WIRE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.03125}
_NORMS_A_LAYER = 2
_MOST_KEPT = 4096  # widths of steps whose parts are remembered; then they are forgotten, all at once
# `attention_bytes_per_s` is measured in bfloat16, with this many query heads for each KV head.
_PROFILED_GROUP, _PROFILED_KV_BYTES = 4, 2.0


class Terms(NamedTuple):
    """Seconds of a step by cause."""

    weights: float = 0.0
    matmul: float = 0.0
    attention: float = 0.0
    collectives: float = 0.0
    transfers: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self[0] + self[1] + self[2] + self[3] + self[4] + self[5]

    def plus(self, other: Terms) -> Terms:
        """Term by term."""
        a, b, c, d, e, f = self
        return Terms(a + other[0], b + other[1], c + other[2], d + other[3], e + other[4], f + other[5])


@dataclass(frozen=True)
class ModelCost:
    """What a model costs wherever it runs: its sizes, how many matrices its MLP has, and the dtypes of a run."""

    shape: ModelShape
    dtypes: Dtypes
    is_gated: bool = True
    is_tied: bool = False

    @staticmethod
    def of(config: ModelConfig, dtypes: Dtypes) -> ModelCost:
        """Of a model as its checkpoint describes it."""
        return ModelCost(config.shape, dtypes, config.is_gated, config.is_tied)

    def layer_weights(self, seat: Seat) -> int:
        """Values in the matrices of one layer that a seat holds: qkv, attention output, up (and gate), down."""
        shape = self.shape
        heads, kv_heads = span_size(seat.spans[Axis.HEADS]), span_size(seat.spans[Axis.KV_HEADS])
        return shape.hidden * (heads + 2 * kv_heads) * shape.head_dim + self.last_weights(seat)

    def last_weights(self, seat: Seat) -> int:
        """Those of them behind the keys and values of the model's last layer: only rows that are sampled meet them."""
        shape, heads = self.shape, span_size(seat.spans[Axis.HEADS])
        return shape.hidden * (heads * shape.head_dim + (3 if self.is_gated else 2) * span_size(seat.spans[Axis.FFN]))

    def vocab_weights(self, seat: Seat) -> int:
        """Values in a seat's rows of the embedding, or of the head."""
        return self.shape.hidden * span_size(seat.spans[Axis.VOCAB])

    def kv_token_bytes(self, seat: Seat) -> float:
        """Bytes of the keys and values of one token in all of a seat's layers."""
        kv_heads = span_size(seat.spans[Axis.KV_HEADS])
        return 2 * len(seat.layers) * kv_heads * self.shape.head_dim * WEIGHT_BYTES[self.dtypes.kv_cache]

    @property
    def head_dtype(self) -> str:
        """The dtype of the head's matrix."""
        return matrix_kind("head.weight", self.dtypes.weights)

    def held_bytes(self, seat: Seat) -> float:
        """Bytes of a seat's weights, as `parallel.requirements.weight_bytes` counts them but for biases.

        The embedding and norms are never quantised. A tied head is the embedding in float32, else a packed copy.
        """
        size = WEIGHT_BYTES[self.dtypes.weights]
        total = len(seat.layers) * (self.layer_weights(seat) * size + _NORMS_A_LAYER * self.shape.hidden * 4)
        if seat.is_first:
            total += self.vocab_weights(seat) * WEIGHT_BYTES[self.dtypes.compute]
        if seat.is_last:
            total += self.shape.hidden * 4
            if not (self.is_tied and seat.is_first and self.head_dtype == "float32"):
                total += self.vocab_weights(seat) * WEIGHT_BYTES[self.head_dtype]
        return total


class _Matrices(NamedTuple):
    """Operations of a row with them, and the seconds in which they come from memory."""

    dtype: str
    row_flops: float
    read_s: float

    @staticmethod
    def of(num_weights: int, dtype: str, profile: RankProfile) -> _Matrices:
        return _Matrices(dtype, 2.0 * num_weights, num_weights * WEIGHT_BYTES[dtype] / profile.memory_bytes_per_s)


class RankCost:
    """One rank's part of a stage, without what it waits for."""

    def __init__(self, model: ModelCost, seat: Seat, profile: RankProfile) -> None:
        self.held_bytes, self.kv_token_bytes = model.held_bytes(seat), model.kv_token_bytes(seat)
        self._matmul, num_layers = profile.matmul, len(seat.layers)
        last, head = (model.last_weights(seat), model.vocab_weights(seat)) if seat.is_last else (0, 0)
        layers = num_layers * model.layer_weights(seat) - last
        self._layers = _Matrices.of(layers, model.dtypes.weights, profile)
        self._last = _Matrices.of(last, model.dtypes.weights, profile)
        self._head = _Matrices.of(head, model.head_dtype, profile)
        heads = span_size(seat.spans[Axis.HEADS])
        # Keys and values come from memory once; each query head then works on them, which is what was measured.
        worked = 2 * num_layers * heads * model.shape.head_dim * _PROFILED_KV_BYTES / _PROFILED_GROUP
        self._kv_token_s = max(self.kv_token_bytes / profile.memory_bytes_per_s, worked / profile.attention_bytes_per_s)
        whole = num_layers - seat.is_last  # layers that every token of a prompt goes through to the end
        self._pair_s = 4.0 * whole * heads * model.shape.head_dim / profile.attention_flops_per_s
        self._step_s = profile.step_s + num_layers * profile.layer_s
        layer_token_s = model.shape.hidden * profile.element_s
        self._token_s = whole * layer_token_s
        kv_heads = span_size(seat.spans[Axis.KV_HEADS])
        self._sequence_s = profile.sequence_s + num_layers * kv_heads * profile.kv_head_s
        logits_s = span_size(seat.spans[Axis.VOCAB]) * profile.logit_s
        self._sample_s = layer_token_s + logits_s if seat.is_last else 0.0
        self._products: dict[tuple[int, int], tuple[float, float]] = {}

    def terms(self, work: StepWork) -> tuple[float, float, float, float]:
        """Seconds of weights, matmul, attention and overhead: weights and matmul together are the measured curve."""
        tokens, samples, sequences, decode_kv_tokens, prefill_pairs = work
        weights, matmul = self._products.get((tokens, samples)) or self._multiplied(tokens, samples)
        attention = decode_kv_tokens * self._kv_token_s + prefill_pairs * self._pair_s
        overhead = self._step_s + tokens * self._token_s + sequences * self._sequence_s + samples * self._sample_s
        return weights, matmul, attention, overhead

    def _multiplied(self, tokens: int, samples: int) -> tuple[float, float]:
        """Weights and matmul of a step; kept, for steps of the same widths come over and over."""
        weights = matmul = 0.0
        for part, rows in ((self._layers, tokens), (self._last, samples), (self._head, samples)):
            if rows and part.row_flops:
                weights += part.read_s
                matmul += max(0.0, part.row_flops * rows / self._matmul.flops_per_s(part.dtype, rows) - part.read_s)
        if len(self._products) >= _MOST_KEPT:
            self._products.clear()
        self._products[tokens, samples] = weights, matmul
        return weights, matmul


class StageCost:
    """The ranks of one stage and what passes between them, and to them from the stage before.

    `held_bytes` and `kv_token_bytes` are those of each rank, in the order of the stage.
    """

    def __init__(self, model: ModelCost, seats: Sequence[Seat], cluster: Cluster, before: Sequence[int]) -> None:
        self._cluster, self._members = cluster, tuple(seat.rank for seat in seats)
        unique: dict[object, RankCost] = {}
        own = [
            unique.setdefault(_alike(seat, cluster), RankCost(model, seat, cluster.ranks[seat.rank])) for seat in seats
        ]
        self.held_bytes = tuple(cost.held_bytes for cost in own)
        self.kv_token_bytes = tuple(cost.kv_token_bytes for cost in own)
        self._own, self._ranks = tuple(own), tuple(unique.values())
        first = seats[0]
        self._num_reduces = 2 * (len(first.layers) - first.is_last) if len(seats) > 1 else 0
        self._reduces_samples = first.is_last and len(seats) > 1  # twice in the last layer
        self._embeds = first.is_first and len(seats) > 1
        self._samples_s = cluster.all_reduce_s(self._members, 16) if self._reduces_samples else 0.0
        self._row_bytes = model.shape.hidden * WEIGHT_BYTES[model.dtypes.compute]
        self._wire_row_bytes = model.shape.hidden * WIRE_BYTES[model.dtypes.wire]
        # An int8 wire carries the sums of layers too, but only between nodes. There wide steps also hide them behind
        # what is computed; that `engine.overlap` may say no, or be found not to pay, is not in the price.
        self._is_far = len({cluster.ranks[rank].node for rank in self._members}) > 1
        is_narrow = model.dtypes.wire == "int8" and self._is_far
        self._sum_row_bytes = self._wire_row_bytes if is_narrow else self._row_bytes
        # Activations are whole on every rank of a stage: rank j gets them from rank j mod n of the n before.
        self._links = {cluster.link(before[j % len(before)], rank) for j, rank in enumerate(self._members) if before}
        self._moves: dict[tuple[int, int], tuple[float, float, float]] = {}

    def terms(self, work: StepWork) -> Terms:
        """Seconds of the slowest rank."""
        ranks = self._ranks
        slowest = ranks[0].terms(work) if len(ranks) == 1 else max((rank.terms(work) for rank in ranks), key=sum)
        weights, matmul, attention, overhead = slowest
        sums, others, transfers = self._moves.get(work[:2]) or self._moved(work)
        if self._is_far:
            sums = self._waited(work, sums, weights + matmul + attention + overhead)
        return Terms(weights, matmul, attention, others + sums, transfers, overhead)

    def rank_seconds(self, work: StepWork) -> list[float]:
        """Seconds in which each rank of the stage computes, or moves what all wait for."""
        sums, others, transfers = self._moved(work)
        computed = [sum(rank.terms(work)) for rank in self._own]
        return [own_s + self._waited(work, sums, own_s) + others + transfers for own_s in computed]

    def _waited(self, work: StepWork, sums: float, computed: float) -> float:
        """What is left of the sums of layers where they travel while the other half of a step is computed."""
        return max(sums - computed, 0.0) if self._is_far and work.tokens >= OVERLAP_ROWS else sums

    def _moved(self, work: StepWork) -> tuple[float, float, float]:
        """Seconds of the sums of layers, of other collectives, and of what comes from the stage before."""
        tokens, samples = work.tokens, work.samples
        found = self._moves.get((tokens, samples))
        if found is None:
            sums = others = transfers = 0.0
            if self._num_reduces:
                sums = self._num_reduces * self._reduce_s(tokens * self._sum_row_bytes)
            if self._reduces_samples and samples:
                others += 2 * self._reduce_s(samples * self._sum_row_bytes) + self._samples_s
            if self._embeds:
                others += self._reduce_s(tokens * self._row_bytes)
            if self._links:
                transfers = max(link.seconds(tokens * self._wire_row_bytes) for link in self._links)
            if len(self._moves) >= _MOST_KEPT:
                self._moves.clear()
            found = self._moves[tokens, samples] = sums, others, transfers
        return found

    def _reduce_s(self, num_bytes: float) -> float:
        return self._cluster.all_reduce_s(self._members, num_bytes)


def _alike(seat: Seat, cluster: Cluster) -> object:
    """Equal for ranks of a stage that take the same time: as much of each axis, on the same kind of machine."""
    return (tuple((axis, span_size(spans)) for axis, spans in seat.spans.items()), cluster.ranks[seat.rank].kind)
