"""Small random checkpoints of every family, in sizes that divide badly, made by transformers from a fixed seed.

Heads that are no power of two, grouped KV heads, a vocabulary of 331 rows, an MLP of 93 channels: whatever assumes
round numbers fails here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 331
NUM_LAYERS = 4
MAX_POSITIONS = 256
LONGROPE_ORIGINAL = 48


@dataclass(frozen=True)
class Model:
    """One checkpoint: a transformers configuration class, its fields, and how large a weight file may be."""

    name: str
    kind: str
    fields: Mapping[str, Any]
    max_shard_size: str = "1GB"


def _llama(name: str, heads: int, kv_heads: int, head_dim: int, hidden: int, **fields: Any) -> Model:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": hidden}
    kind = fields.pop("kind", "Llama")
    files = fields.pop("max_shard_size", "1GB")
    return Model(name, kind, {"intermediate_size": 93, **sizes, **fields}, files)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.1, 1.25, 1.5],
    long_factor=[1.3, 2.0, 3.0, 4.5],
    original_max_position_embeddings=LONGROPE_ORIGINAL,
)
_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)

MODELS: tuple[Model, ...] = (
    _llama("llama", 6, 2, 16, 60, attention_bias=True, mlp_bias=True, max_shard_size="60KB"),
    _llama("llama-linear", 7, 7, 8, 49, tie_word_embeddings=True, **_rope("linear", factor=2.5)),
    _llama("llama-dynamic", 10, 5, 8, 50, **_rope("dynamic", factor=2.0)),
    _llama("llama-llama3", 14, 2, 12, 70, tie_word_embeddings=True, **_LLAMA3),
    _llama("llama-yarn", 12, 4, 12, 72, **_rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    _llama("llama-longrope", 9, 3, 8, 54, **_LONGROPE),
    _llama("mistral", 6, 3, 16, 58, kind="Mistral", sliding_window=11),
    _llama("qwen2", 7, 1, 16, 56, kind="Qwen2", tie_word_embeddings=True),
    _llama("qwen2-sliding", 12, 6, 6, 52, kind="Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=2),
    _llama("qwen3", 5, 5, 32, 62, kind="Qwen3", tie_word_embeddings=True, max_shard_size="90KB"),
    Model("gpt2", "GPT2", {"n_embd": 55, "n_head": 5, "n_inner": 93, "n_layer": NUM_LAYERS, "n_positions": 256}),
)


def make_model(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint into `folder`/name and return that directory."""
    common: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.2}
    if model.kind != "GPT2":
        common |= {"num_hidden_layers": NUM_LAYERS, "max_position_embeddings": MAX_POSITIONS}
    config = getattr(transformers, f"{model.kind}Config")(**common, **model.fields)
    torch.manual_seed(sum(model.name.encode()))
    auto: Any = transformers.AutoModelForCausalLM
    made = auto.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:  # norms begin as ones and biases as zeros, which would hide a mistake
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    directory = folder / model.name
    made.to(dtype).save_pretrained(directory, max_shard_size=model.max_shard_size)
    return directory
