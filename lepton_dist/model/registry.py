"""From a checkpoint directory to its family and configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lepton_dist.model.architectures.gpt2 import GPT2
from lepton_dist.model.architectures.llama import LLAMA
from lepton_dist.model.architectures.mistral import MISTRAL
from lepton_dist.model.architectures.qwen2 import QWEN2
from lepton_dist.model.architectures.qwen3 import QWEN3
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family
from lepton_dist.model.fields import ConfigFields

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)


def read_model(directory: str | Path) -> tuple[ModelConfig, Family]:
    """The configuration of a checkpoint and the family that its weights are named by.

    `generation_config.json`, where there is one, has the last word on the end tokens, as it has in transformers.

    Raises:
        CheckpointError: config.json is absent, malformed, of an unknown `model_type`, or of a quantised checkpoint.
    """
    fields = ConfigFields.read(directory)
    model_type = fields.get("model_type")
    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in known:
        raise fields.error("model_type", f"{model_type!r} is not supported; known: {', '.join(sorted(known))}")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised checkpoints are not supported by this version")
    family = known[model_type]
    config = family.read(fields)
    generation = Path(directory) / "generation_config.json"
    if generation.is_file():
        eos = ConfigFields.read_file(generation).integers("eos_token_id")
        config = replace(config, eos_token_ids=eos or config.eos_token_ids)
    return config, family
