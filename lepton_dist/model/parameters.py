"""The parameters of a decoder: names, logical axes, and the checkpoint tensors that each is made of.

Query, key and value are one parameter, and so are gate and up: one matmul reads the input once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family, Source
from lepton_dist.plan.axes import Axis, AxisSpans, Span, span_size
from lepton_dist.plan.precision import INT4_GROUPS


@dataclass(frozen=True)
class Part:
    """The rows of a parameter that come from one checkpoint tensor.

    ``units`` are the elements that one index of each axis covers (head_dim for heads). ``extents`` are the full sizes.
    """

    source: Source
    tensor: str
    axes: tuple[Axis | None, ...]
    units: tuple[int, ...]
    extents: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the checkpoint tensor must have."""
        shape = (self.extents[0] * self.source.sections, *self.extents[1:])
        return shape[::-1] if self.source.transposed else shape


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank's stage: its parts stacked along dim 0."""

    name: str
    parts: tuple[Part, ...]

    def local_shape(self, spans: AxisSpans) -> tuple[int, ...]:
        """The shape on a rank that holds `spans`."""
        rows = sum(span_size(local_spans(part, 0, spans)) for part in self.parts)
        first = self.parts[0]
        return (rows, *(span_size(local_spans(first, dim, spans)) for dim in range(1, len(first.axes))))


def local_spans(part: Part, dim: int, spans: AxisSpans) -> tuple[Span, ...]:
    """The element ranges of one dim of a part that a rank holds."""
    axis = part.axes[dim]
    if axis is None or axis not in spans:
        return (Span(0, part.extents[dim]),)
    return tuple(span.scaled(part.units[dim]) for span in spans[axis])


def matrix_kind(name: str, weights: str) -> str:
    """The kind in which the matrix `name` is held where `weights` is asked for.

    The head decides every token and is rounded to 8 bits at most.
    """
    return "int8" if weights in INT4_GROUPS and name == "head.weight" else weights


def is_factor(name: str, num_dims: int) -> bool:
    """Whether a parameter is a matrix that is multiplied with: no vector, and no table of rows to pick from."""
    return num_dims > 1 and name not in ("embedding.weight", "positions.weight")


class ParameterTable:
    """The parameters of a model of a family, by stage."""

    def __init__(self, config: ModelConfig, family: Family, prefix: str = "") -> None:
        self.config, self.family, self.prefix = config, family, prefix

    def of_stage(self, layers: range) -> Iterator[Parameter]:
        """Every parameter of a stage, in the order in which it is loaded and used."""
        if layers.start == 0:
            yield from self.embedding()
        for index in layers:
            yield from self.layer(index)
        if layers.stop == self.config.shape.num_layers:
            yield from self.head(is_shared=self.config.is_tied and layers.start == 0)

    def embedding(self) -> Iterator[Parameter]:
        """The embedding, with learned positions where the family has them."""
        yield self._parameter("embedding.weight", ("embedding",), (Axis.VOCAB, Axis.EMBED))
        if self.config.rope is None:
            extents = (self.config.max_positions, self.config.shape.hidden)
            yield Parameter("positions.weight", (self._part("positions", "weight", (None, Axis.EMBED), extents),))

    def layer(self, index: int) -> Iterator[Parameter]:
        """The parameters of one layer."""
        config, at = self.config, f"layers.{index}."
        yield from self._norm(f"{at}attention_norm", "attention_norm", index)
        heads = (Axis.HEADS, Axis.KV_HEADS, Axis.KV_HEADS)
        yield self._fused(f"{at}qkv.weight", ("q", "k", "v"), [(axis, Axis.EMBED) for axis in heads], index)
        if "qkv" in config.biases:
            yield self._fused(f"{at}qkv.bias", ("q", "k", "v"), [(axis,) for axis in heads], index)
        if config.has_qk_norm:
            for name in ("q_norm", "k_norm"):
                part = self._part(name, "weight", (None,), (config.shape.head_dim,), index)
                yield Parameter(f"{at}{name}.weight", (part,))
        yield self._parameter(f"{at}attention_output.weight", ("attention_output",), (Axis.EMBED, Axis.HEADS), index)
        if "attention_output" in config.biases:
            yield self._parameter(f"{at}attention_output.bias", ("attention_output",), (Axis.EMBED,), index)
        yield from self._norm(f"{at}mlp_norm", "mlp_norm", index)
        inner = ("gate", "up") if config.is_gated else ("up",)
        yield self._fused(f"{at}up.weight", inner, [(Axis.FFN, Axis.EMBED)] * len(inner), index)
        if "mlp" in config.biases:
            yield self._fused(f"{at}up.bias", inner, [(Axis.FFN,)] * len(inner), index)
        yield self._parameter(f"{at}down.weight", ("down",), (Axis.EMBED, Axis.FFN), index)
        if "mlp" in config.biases:
            yield self._parameter(f"{at}down.bias", ("down",), (Axis.EMBED,), index)

    def head(self, *, is_shared: bool) -> Iterator[Parameter]:
        """The last norm and the head; a head tied to an embedding on the same stage is not a second parameter."""
        yield from self._norm("final_norm", "final_norm", None)
        if not is_shared:
            name = "embedding" if self.config.is_tied else "head"
            yield self._parameter("head.weight", (name,), (Axis.VOCAB, Axis.EMBED))

    def _norm(self, name: str, source: str, index: int | None) -> Iterator[Parameter]:
        for kind in ("weight", "bias") if self.config.norm == "layer" else ("weight",):
            yield Parameter(f"{name}.{kind}", (self._part(source, kind, (Axis.EMBED,), None, index),))

    def _parameter(self, name: str, sources: tuple[str], axes: tuple[Axis, ...], index: int | None = None) -> Parameter:
        return self._fused(name, sources, [axes], index)

    def _fused(self, name: str, sources: tuple[str, ...], axes: list[tuple[Axis, ...]], index: int | None) -> Parameter:
        kind = name.rsplit(".", 1)[1]
        parts = (self._part(source, kind, axis, None, index) for source, axis in zip(sources, axes, strict=True))
        return Parameter(name, tuple(parts))

    def _part(
        self,
        name: str,
        kind: str,
        axes: tuple[Axis | None, ...],
        extents: tuple[int, ...] | None,
        index: int | None = None,
    ) -> Part:
        source = self.family.sources[name]
        tensor = ("" if source.is_bare else self.prefix) + source.name.format(i=index) + f".{kind}"
        units = tuple(self.config.shape.head_dim if axis in (Axis.HEADS, Axis.KV_HEADS) else 1 for axis in axes)
        sizes = extents or tuple(self._extent(axis) for axis in axes if axis is not None)
        return Part(source, tensor, axes, units, sizes)

    def _extent(self, axis: Axis) -> int:
        shape = self.config.shape
        sizes = {
            Axis.EMBED: shape.hidden,
            Axis.HEADS: shape.num_heads * shape.head_dim,
            Axis.KV_HEADS: shape.num_kv_heads * shape.head_dim,
            Axis.FFN: shape.ffn,
            Axis.VOCAB: shape.vocab,
        }
        return sizes[axis]
