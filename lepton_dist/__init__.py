"""lepton_dist: large language models over MPI. Public names only; each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lepton_dist.config.spinning import bound_spinning

if TYPE_CHECKING:
    from lepton_dist.api import LeptonInference
    from lepton_dist.config.sampling import SamplingParams
    from lepton_dist.plan.document import load_plan
    from lepton_dist.plan.plan import Plan
    from lepton_dist.text.dataset import load_dataset

__all__ = ["LeptonInference", "Plan", "SamplingParams", "load_dataset", "load_plan"]

_HOMES = {
    "LeptonInference": "lepton_dist.api",
    "Plan": "lepton_dist.plan.plan",
    "SamplingParams": "lepton_dist.config.sampling",
    "load_dataset": "lepton_dist.text.dataset",
    "load_plan": "lepton_dist.plan.document",
}


bound_spinning()  # before anything imports torch


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lepton_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
