"""Qwen3 (arXiv:2505.09388): Llama with RMS norms on the queries and keys of each head."""

from __future__ import annotations

from lepton_dist.model.architectures.llama import LLAMA_SOURCES, read_llama_type
from lepton_dist.model.architectures.qwen2 import read_qwen_windows
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family
from lepton_dist.model.fields import ConfigFields


def _read(fields: ConfigFields) -> ModelConfig:
    biases = frozenset({"qkv", "attention_output"}) if fields.flag("attention_bias", False) else frozenset[str]()
    windows = read_qwen_windows(fields)
    return read_llama_type(
        fields, "qwen3", biases=biases, has_qk_norm=True, windows=windows, head_dim=128, positions=32768
    )


QWEN3 = Family(("qwen3",), _read, LLAMA_SOURCES, ("model.", ""))
