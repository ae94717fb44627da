"""Reading config.json: what each family takes from it, and what is said of one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lepton_dist.errors import CheckpointError
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.registry import FAMILIES, read_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 93,
    "vocab_size": 331,
    "max_position_embeddings": 128,
}


def write(folder: Path, **fields: Any) -> Path:
    values = {name: value for name, value in {**LLAMA, **fields}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read(folder: Path, **fields: Any) -> ModelConfig:
    return read_model(write(folder, **fields))[0]


def test_sizes(tmp_path: Path) -> None:
    shape = read(tmp_path).shape
    assert (shape.num_layers, shape.hidden, shape.num_heads, shape.num_kv_heads) == (3, 48, 6, 2)
    assert (shape.head_dim, shape.ffn, shape.vocab) == (8, 93, 331)
    assert read(tmp_path, head_dim=20).shape.head_dim == 20
    assert read(tmp_path, num_key_value_heads=None).shape.num_kv_heads == 6


def test_biases(tmp_path: Path) -> None:
    assert read(tmp_path).biases == set()
    assert read(tmp_path, attention_bias=True).biases == {"qkv", "attention_output"}
    assert read(tmp_path, attention_bias=True, mlp_bias=True).biases == {"qkv", "attention_output", "mlp"}
    assert read(tmp_path, model_type="qwen2").biases == {"qkv"}
    assert read(tmp_path, model_type="qwen3").biases == set()


def test_windows(tmp_path: Path) -> None:
    def windows(**fields: Any) -> tuple[int | None, ...]:
        return read(tmp_path, **fields).windows

    assert windows(sliding_window=9) == (None,) * 3  # not a field of Llama
    assert windows(model_type="mistral", sliding_window=9) == (9, 9, 9)
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 3
    assert windows(model_type="mistral") == (4096,) * 3
    assert windows(model_type="qwen2", sliding_window=9) == (None,) * 3
    sliding = {"sliding_window": 9, "use_sliding_window": True}
    assert windows(model_type="qwen2", max_window_layers=1, **sliding) == (None, 9, 9)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(model_type="qwen3", layer_types=kinds, **sliding) == (9, None, 9)


def test_end_tokens(tmp_path: Path) -> None:
    assert read(tmp_path).eos_token_ids == ()
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (5, 7)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (2,)


def test_dtype_in_both_spellings(tmp_path: Path) -> None:
    assert read(tmp_path).dtype == "float32"
    assert read(tmp_path, dtype="bfloat16").dtype == "bfloat16"
    assert read(tmp_path, torch_dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, r"model_type: 'mamba' is not supported; known: gpt2, llama, mistral, qwen2, qwen3"),
        ({"model_type": "absent"}, "model_type: None is not supported"),
        ({"hidden_size": "absent"}, "hidden_size: is missing"),
        ({"hidden_size": "48"}, "hidden_size: must be a whole number of at least 1, not '48'"),
        ({"vocab_size": 0}, "vocab_size: must be a whole number of at least 1, not 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a whole number"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: 4 does not divide num_attention_heads 6"),
        ({"head_dim": 7}, "head_dim: 7 is odd"),
        ({"hidden_act": "swiglu"}, "hidden_act: 'swiglu' is not supported; known: silu"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: must be true or false, not 1"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported"),
        ({"eos_token_id": "end"}, "eos_token_id: must be a whole number or a list of them"),
        ({"rope_parameters": 3}, "rope_parameters: must be a mapping, not 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised checkpoints are not supported"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types: must list the kind of each of the 3",
        ),
        ({"model_type": "qwen2", "layer_types": ["linear"] * 3}, "layer_types: linear: not supported"),
        ({"model_type": "gpt2", "n_embd": 50, "n_head": 12}, "n_embd: 50 is not a multiple of n_head 12"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "true is not supported"),
    ],
    ids=str,
)
def test_mistakes_are_named(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read(tmp_path, **fields)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_model(tmp_path)
    for text, words in (("{", "is not valid JSON"), ("[]", "must hold a JSON object, not list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            read_model(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not UTF-8 text"):
        read_model(tmp_path)


def test_no_two_families_claim_one_type() -> None:
    types = [name for family in FAMILIES for name in family.model_types]
    assert len(set(types)) == len(types)
