"""Models of named shapes with random weights, for measuring where no checkpoint is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lepton_dist.errors import UsageError

_MARK = "lepton_bench"


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-type model, untied, with bfloat16 weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int


SHAPES = {
    "tiny": LlamaShape(256, 4, 8, 4, 32, 704, 4096),
    "160m": LlamaShape(768, 12, 12, 4, 64, 3072, 32000),
    "1b": LlamaShape(2048, 16, 32, 8, 64, 8192, 32000),
    "3b": LlamaShape(3072, 28, 24, 8, 128, 8192, 32000),
    "8b": LlamaShape(4096, 32, 32, 8, 128, 14336, 128256),
}


def shaped_model(name: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint directory of a named shape under `folder`, made when it is not there; seeded, normal, std 0.02.

    Raises:
        UsageError: the shape is unknown, or the folder cannot be written.
    """
    if name not in SHAPES:
        raise UsageError(f"--shape {name}: unknown; known: {', '.join(SHAPES)}")
    directory = folder / f"{_MARK}-{name}-{seed}"
    try:
        # config.json comes last: without it, what lies there is unfinished.
        if not (directory / "config.json").is_file():
            directory.mkdir(parents=True, exist_ok=True)
            _write_weights(directory / "model.safetensors", SHAPES[name], seed)
            draft = directory / "config.json.new"
            draft.write_text(json.dumps(shape_config(SHAPES[name]), indent=1), encoding="utf-8")
            draft.replace(directory / "config.json")
    except OSError as error:
        raise UsageError(f"{directory}: the model cannot be written: {error.strerror}") from None
    return directory


def shape_config(shape: LlamaShape, max_positions: int = 4096) -> dict[str, object]:
    """The config.json of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "eos_token_id": 2,
    }


def _tensors(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, shape.hidden)
    for index in range(shape.layers):
        at = f"model.layers.{index}."
        yield f"{at}input_layernorm.weight", (shape.hidden,)
        yield f"{at}self_attn.q_proj.weight", (heads, shape.hidden)
        yield f"{at}self_attn.k_proj.weight", (kv_heads, shape.hidden)
        yield f"{at}self_attn.v_proj.weight", (kv_heads, shape.hidden)
        yield f"{at}self_attn.o_proj.weight", (shape.hidden, heads)
        yield f"{at}post_attention_layernorm.weight", (shape.hidden,)
        yield f"{at}mlp.gate_proj.weight", (shape.ffn, shape.hidden)
        yield f"{at}mlp.up_proj.weight", (shape.ffn, shape.hidden)
        yield f"{at}mlp.down_proj.weight", (shape.hidden, shape.ffn)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocab, shape.hidden)


def _write_weights(path: Path, shape: LlamaShape, seed: int) -> None:
    """A safetensors file, one tensor in memory at a time."""
    import torch  # not above: `bench --help` lists the shapes

    header: dict[str, object] = {}
    offset = 0
    for name, extents in _tensors(shape):
        size = 2 * torch.Size(extents).numel()
        header[name] = {"dtype": "BF16", "shape": list(extents), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, extents in _tensors(shape):
            is_norm = len(extents) == 1
            values = torch.ones(extents) if is_norm else torch.randn(extents, generator=generator) * 0.02
            stream.write(values.bfloat16().view(torch.int16).numpy().tobytes())
        stream.flush()
        os.fsync(stream.fileno())
