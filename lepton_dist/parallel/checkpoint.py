"""A checkpoint as its small files and the headers of its weights tell of it, on the rank that reads them and on others.

Without torch. One rank reads; the others are sent what it found, so that a parallel file system sees each file once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from lepton_dist.errors import CheckpointError
from lepton_dist.model.config import ModelConfig
from lepton_dist.model.family import Family
from lepton_dist.model.fields import ConfigFields
from lepton_dist.model.parameters import ParameterTable
from lepton_dist.model.registry import model_of, read_generation_config, read_model
from lepton_dist.parallel.requirements import name_prefix, parameter_table
from lepton_dist.storage.index import CheckpointIndex, PackedIndex
from lepton_dist.values import FLOATS


class _Packed(msgspec.Struct, array_like=True):
    """A checkpoint on its way: its two configurations as JSON, and the index."""

    values: bytes
    generation: bytes
    index: PackedIndex


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds. `notice` is what the user should know of it; often empty."""

    config: ModelConfig
    index: CheckpointIndex
    table: ParameterTable
    notice: str
    _values: Mapping[str, Any]
    _generation: Mapping[str, Any]

    @staticmethod
    def read(directory: str | Path) -> Checkpoint:
        """Read config.json, generation_config.json and the headers of the weights.

        Raises:
            CheckpointError: the checkpoint is incomplete, malformed, or of an unknown kind.
        """
        values, generation = ConfigFields.read(directory).values, read_generation_config(directory)
        model_of(directory, values, generation)  # what is wrong with these shows before the weights are looked for
        return _checked(directory, values, generation, CheckpointIndex.read(directory))

    def packed(self) -> bytes:
        """The checkpoint in a form that can be sent."""
        values, generation = json.dumps(self._values).encode(), json.dumps(self._generation).encode()
        return msgspec.msgpack.encode(_Packed(values, generation, self.index.packed()))

    @staticmethod
    def unpacked(directory: str | Path, data: bytes) -> Checkpoint:
        """The checkpoint in a directory, as another rank has read it."""
        packed = msgspec.msgpack.decode(data, type=_Packed)
        index = CheckpointIndex.unpacked(directory, packed.index)
        return _checked(directory, json.loads(packed.values), json.loads(packed.generation), index)


def planned_config(directory: str | Path) -> ModelConfig:
    """The configuration of a model to plan for, whose weights need not be there.

    Raises:
        CheckpointError: its config.json is absent or malformed.
    """
    config, family = read_model(directory)
    try:
        index = CheckpointIndex.read(directory)
    except CheckpointError:
        return replace(config, dtype=config.dtype or "float32")
    return _settled(config, family, index)[0]


def _checked(
    directory: str | Path, values: Mapping[str, Any], generation: Mapping[str, Any], index: CheckpointIndex
) -> Checkpoint:
    config, family = model_of(directory, values, generation)
    config, family, notice = _settled(config, family, index)
    table = parameter_table(index, config, family)
    return Checkpoint(config, index, table, notice and f"{directory}: {notice}", values, generation)


def _settled(config: ModelConfig, family: Family, index: CheckpointIndex) -> tuple[ModelConfig, Family, str]:
    """What the weights decide: the dtype where the configuration does not, and whether the head is the embedding."""
    config = replace(config, dtype=config.dtype or index.main_dtype(FLOATS) or "float32")
    embedding, head = (family.sources[name] for name in ("embedding", "head"))
    if not config.is_tied or f"{head.name}.weight" not in index:
        return config, family, ""
    if f"{name_prefix(index, family)}{embedding.name}.weight" not in index:
        return config, replace(family, sources={**family.sources, "embedding": head}), ""
    notice = (
        f"config.json ties the head to the embedding (tie_word_embeddings), but the weights have {head.name}.weight, "
        "which is used, as transformers does where the two differ"
    )
    return replace(config, is_tied=False), family, notice
