"""From a checkpoint directory to its family and configuration."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lepton_dist.checkpoint_files import parse_json_object, read_checkpoint_text
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
    return model_of(directory, ConfigFields.read(directory).values, read_generation_config(directory))


def read_generation_config(directory: str | Path) -> dict[str, Any]:
    """The values of generation_config.json; none where it is absent, or a file without any content.

    Raises:
        CheckpointError: it is no JSON object.
    """
    path = Path(directory) / "generation_config.json"
    text = read_checkpoint_text(path) if path.is_file() else ""
    return parse_json_object(path, text) if text.strip() else {}


def model_of(
    directory: str | Path, values: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[ModelConfig, Family]:
    """The same from the values of a directory's config.json and generation_config.json.

    Raises:
        CheckpointError: as `read_model`.
    """
    fields = ConfigFields(Path(directory) / "config.json", values)
    model_type = fields.get("model_type")
    known = {name: family for family in FAMILIES for name in family.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise fields.error(
            "model_type", f"{reprlib.repr(model_type)} is not supported; known: {', '.join(sorted(known))}"
        )
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised checkpoints are not supported by this version")
    family = known[model_type]
    config = family.read(fields)
    eos = ConfigFields(Path(directory) / "generation_config.json", generation).token_ids("eos_token_id")
    return replace(config, eos_token_ids=eos or config.eos_token_ids), family
