"""Small Llama checkpoints and tokenizers, written with numpy: of random weights, or with a text of one's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]

_HIDDEN_FOR_CHAINS, _HEADS = 256, 4


def save_tensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str = "F32") -> None:
    """A safetensors file, in ``F32`` or (rounded towards zero) ``BF16``."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        whole = np.ascontiguousarray(values, dtype=np.float32)
        raw = whole.tobytes() if dtype == "F32" else (whole.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def llama_config(vocab: int, hidden: int, ffn: int, layers: int, **changes: Any) -> dict[str, Any]:
    """A config.json of four heads; `changes` override it, and None takes a key out."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
    }
    return {name: value for name, value in (config | changes).items() if value is not None}


def layer_tensors(index: int, hidden: int, ffn: int) -> Tensors:
    """One layer's tensors, all zero but the norms, which are one."""
    at = f"model.layers.{index}."
    square = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes = square | {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    found: Tensors = {f"{at}{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name in ("input_layernorm", "post_attention_layernorm"):
        found[f"{at}{name}.weight"] = np.ones(hidden, np.float32)
    return found


def random_tensors(*, vocab: int = 96, hidden: int = 32, ffn: int = 64, layers: int = 2, seed: int = 0) -> Tensors:
    """The tensors of a model of random weights."""
    random = np.random.default_rng(seed)
    found: Tensors = {
        name: np.zeros((vocab, hidden), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for index in range(layers):
        found |= layer_tensors(index, hidden, ffn)
    found["model.norm.weight"] = np.ones(hidden, np.float32)
    for name, values in found.items():
        if values.ndim > 1:
            found[name] = random.standard_normal(values.shape).astype(np.float32) * np.float32(0.3)
    return found


def write_random(folder: Path, *, stored: str = "F32", **changes: Any) -> Path:
    """A checkpoint of random weights, the same ones each time; `changes` as in `llama_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", random_tensors(), stored)
    (folder / "config.json").write_text(json.dumps(llama_config(96, 32, 64, 2, **changes)))
    return folder


def write_chain(folder: Path, vocab: int, following: Mapping[int, int], **changes: Any) -> Path:
    """A checkpoint whose greedy decoding takes after each token the one that `following` names."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, ffn, layers = _HIDDEN_FOR_CHAINS, 64, 2
    embedding = np.random.default_rng(1).standard_normal((vocab, hidden)).astype(np.float32)
    embedding *= np.float32(hidden**0.5) / np.linalg.norm(embedding, axis=1, keepdims=True)
    head = np.zeros((vocab, hidden), np.float32)
    for token, successor in following.items():
        head[successor] += embedding[token] * np.float32(0.2)
    tensors: Tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for index in range(layers):
        tensors |= layer_tensors(index, hidden, ffn)
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    save_tensors(folder / "model.safetensors", tensors)
    config = llama_config(vocab, hidden, ffn, layers, **changes)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sentencepiece(folder: Path, words: Sequence[str], scheme: str = "prepend", **config: Any) -> dict[str, int]:
    """A tokenizer of SentencePiece's kind, as Llama 2's (``prepend``) or Mistral's (``metaspace``); its tokens' ids.

    It has single bytes, letters, the mark for a space, and `words`, which begin with that mark.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", *map(chr, range(97, 123))]
    merges: list[list[str]] = []
    for word in words:
        whole = word[0]
        for letter in word[1:]:
            if [whole, letter] not in merges:
                merges.append([whole, letter])
            whole += letter
            if whole not in tokens:
                tokens.append(whole)
    ids = {token: number for number, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    space = {"String": " "}
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": space, "content": "▁"}]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    sequences = {name: {"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }
    whole_file = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": steps} if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, sequences["A"]],
            "pair": [sequences["A"], sequences["B"]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole_file, ensure_ascii=False))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings | config))
    return ids
