"""GPT-2: learned positions, layer norms, a plain MLP, weights stored [in, out] with query, key and value in one."""

from __future__ import annotations

from lepton_dist.model.architectures.llama import ACTIVATIONS
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family, Source
from lepton_dist.model.fields import ConfigFields
from lepton_dist.plan.axes import ModelShape

_QKV = "h.{i}.attn.c_attn"
_SOURCES = {
    "embedding": Source("wte"),
    "positions": Source("wpe"),
    "attention_norm": Source("h.{i}.ln_1"),
    "q": Source(_QKV, transposed=True, section=0, sections=3),
    "k": Source(_QKV, transposed=True, section=1, sections=3),
    "v": Source(_QKV, transposed=True, section=2, sections=3),
    "attention_output": Source("h.{i}.attn.c_proj", transposed=True),
    "mlp_norm": Source("h.{i}.ln_2"),
    "up": Source("h.{i}.mlp.c_fc", transposed=True),
    "down": Source("h.{i}.mlp.c_proj", transposed=True),
    "final_norm": Source("ln_f"),
    "head": Source("lm_head", is_bare=True),
}


def _read(fields: ConfigFields) -> ModelConfig:
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if fields.flag(key, False):
            raise fields.error(key, "true is not supported")
    if not fields.flag("scale_attn_weights", True):
        raise fields.error("scale_attn_weights", "false is not supported")
    hidden, num_heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
    if hidden % num_heads:
        raise fields.error("n_embd", f"{hidden} is not a multiple of n_head {num_heads}")
    num_layers = fields.layers("n_layer", 12)
    return ModelConfig(
        family="gpt2",
        shape=ModelShape(
            num_layers=num_layers,
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden // num_heads,
            ffn=fields.integer("n_inner", 4 * hidden),
            vocab=fields.integer("vocab_size", 50257),
        ),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0.0, most=1.0),
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        is_gated=False,
        rope=None,
        max_positions=fields.integer("n_positions", 1024),
        windows=(None,) * num_layers,
        biases=frozenset({"qkv", "attention_output", "mlp"}),
        is_tied=fields.flag("tie_word_embeddings", True),
        dtype=fields.dtype(),
        eos_token_ids=fields.token_ids("eos_token_id", 50256),
    )


GPT2 = Family(("gpt2",), _read, _SOURCES, ("transformer.", ""))
