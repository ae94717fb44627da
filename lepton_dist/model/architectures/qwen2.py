"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on query, key and value."""

from __future__ import annotations

from lepton_dist.model.architectures.llama import LLAMA_SOURCES, read_llama_type, read_windows
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family
from lepton_dist.model.fields import ConfigFields


def read_qwen_windows(fields: ConfigFields) -> tuple[int | None, ...]:
    """Sliding windows, when `use_sliding_window` asks for them, in the layers from `max_window_layers` on."""
    window = fields.integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, least=0)
    return read_windows(fields, fields.layers("num_hidden_layers"), window=window, first_layer=first)


def _read(fields: ConfigFields) -> ModelConfig:
    return read_llama_type(
        fields, "qwen2", biases=frozenset({"qkv"}), windows=read_qwen_windows(fields), positions=32768
    )


QWEN2 = Family(("qwen2",), _read, LLAMA_SOURCES, ("model.", ""))
