"""Llama (arXiv:2302.13971), and what the families derived from it share."""

from __future__ import annotations

import reprlib

from lepton_dist.model.architectures.rotary import read_rope
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family, Source
from lepton_dist.model.fields import ConfigFields
from lepton_dist.plan.axes import ModelShape

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

LLAMA_SOURCES = {
    "embedding": Source("embed_tokens"),
    "attention_norm": Source("layers.{i}.input_layernorm"),
    "q": Source("layers.{i}.self_attn.q_proj"),
    "k": Source("layers.{i}.self_attn.k_proj"),
    "v": Source("layers.{i}.self_attn.v_proj"),
    "q_norm": Source("layers.{i}.self_attn.q_norm"),
    "k_norm": Source("layers.{i}.self_attn.k_norm"),
    "attention_output": Source("layers.{i}.self_attn.o_proj"),
    "mlp_norm": Source("layers.{i}.post_attention_layernorm"),
    "gate": Source("layers.{i}.mlp.gate_proj"),
    "up": Source("layers.{i}.mlp.up_proj"),
    "down": Source("layers.{i}.mlp.down_proj"),
    "final_norm": Source("norm"),
    "head": Source("lm_head", is_bare=True),
}


def read_shape(fields: ConfigFields, *, head_dim: int | None = None) -> ModelShape:
    """The sizes of a Llama-type model; `head_dim` is the family's default where it does not follow from the rest."""
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    dim = fields.integer("head_dim", head_dim or hidden // num_heads)
    if dim % 2:
        raise fields.error("head_dim", f"{dim} is odd, but rotary positions need pairs")
    return ModelShape(
        num_layers=fields.layers("num_hidden_layers"),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        ffn=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
    )


def read_windows(
    fields: ConfigFields, num_layers: int, *, window: int | None, first_layer: int = 0
) -> tuple[int | None, ...]:
    """Each layer's sliding window: by `layer_types` where given, else `window` from `first_layer` on."""
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(window if index >= first_layer else None for index in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise fields.error("layer_types", f"must list the kind of each of the {num_layers} layers")
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise fields.error("layer_types", f"{reprlib.repr(unknown[0])} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_llama_type(
    fields: ConfigFields,
    family: str,
    *,
    biases: frozenset[str] = frozenset(),
    has_qk_norm: bool = False,
    windows: tuple[int | None, ...] | None = None,
    head_dim: int | None = None,
    positions: int = 2048,
    end_token: int | None = None,
) -> ModelConfig:
    """The configuration of a family derived from Llama; `positions` and `end_token` where it does not say."""
    shape = read_shape(fields, head_dim=head_dim)
    rope = read_rope(fields, shape.head_dim, fields.integer("max_position_embeddings", positions))
    return ModelConfig(
        family=family,
        shape=shape,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0, most=1.0),
        activation=fields.choice("hidden_act", "silu", ACTIVATIONS),
        is_gated=True,
        rope=rope,
        max_positions=rope.context_tokens,
        windows=windows or (None,) * shape.num_layers,
        biases=biases,
        has_qk_norm=has_qk_norm,
        is_tied=fields.flag("tie_word_embeddings", False),
        dtype=fields.dtype(),
        eos_token_ids=fields.token_ids("eos_token_id", end_token),
    )


def _read(fields: ConfigFields) -> ModelConfig:
    biases = {"qkv", "attention_output"} if fields.flag("attention_bias", False) else set()
    if fields.flag("mlp_bias", False):
        biases.add("mlp")
    return read_llama_type(fields, "llama", biases=frozenset(biases), end_token=2)


LLAMA = Family(("llama",), _read, LLAMA_SOURCES, ("model.", ""))
