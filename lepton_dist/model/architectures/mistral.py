"""Mistral (arXiv:2310.06825): Llama with a sliding attention window in every layer."""

from __future__ import annotations

from lepton_dist.model.architectures.llama import LLAMA_SOURCES, read_llama_type, read_windows
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family
from lepton_dist.model.fields import ConfigFields


def _read(fields: ConfigFields) -> ModelConfig:
    # An explicit null means full attention (Mistral v0.2 and later); an absent key means the family's default of 4096.
    has_window = fields.values.get("sliding_window", 4096) is not None
    window = fields.integer("sliding_window", 4096) if has_window else None
    windows = (window,) * fields.layers("num_hidden_layers")
    if read_windows(fields, len(windows), window=window) != windows:
        raise fields.error("layer_types", "Mistral has the same attention in every layer; the model type is another")
    return read_llama_type(fields, "mistral", windows=windows, positions=131072, end_token=2)


MISTRAL = Family(("mistral",), _read, LLAMA_SOURCES, ("model.", ""))
