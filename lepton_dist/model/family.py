"""What a model family declares: how to read its configuration and what its checkpoint calls each weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lepton_dist.model.config import ModelConfig
from lepton_dist.model.fields import ConfigFields


@dataclass(frozen=True)
class Source:
    """Where a weight lies in a checkpoint.

    ``{i}`` in `name` is the layer. ``transposed`` weights are stored [in, out]; a fused tensor holds ``sections``
    equal parts along its out dim, of which this weight is number ``section``. ``is_bare`` names take no prefix.
    """

    name: str
    transposed: bool = False
    section: int = 0
    sections: int = 1
    is_bare: bool = False


@dataclass(frozen=True)
class Family:
    """A model family as data.

    `sources` maps our names (``q``, ``gate``, ``attention_norm``, ...) to checkpoint names without ``.weight`` and
    ``.bias``; `prefixes` are what those names may begin with.
    """

    model_types: tuple[str, ...]
    read: Callable[[ConfigFields], ModelConfig]
    sources: Mapping[str, Source]
    prefixes: tuple[str, ...] = ("",)
