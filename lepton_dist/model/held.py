"""A seat's parameters in the form in which they compute."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lepton_dist.kernels.linear import Weight, make_weight
from lepton_dist.model.parameters import is_factor, matrix_kind


@dataclass
class HeldParameters:
    """Matrices that are multiplied with, packed or rounded to `weights`; all else as plain tensors; by name."""

    weights: str
    matrices: dict[str, Weight] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Hold a parameter that is loaded. Packing each at once leaves only one that is there in both forms."""
        if is_factor(name, tensor.dim()):
            self.matrices[name] = make_weight(tensor, matrix_kind(name, self.weights))
        else:
            self.tensors[name] = tensor

    def tied_head(self) -> Weight:
        """The head that is the embedding's matrix, which the embedding keeps."""
        return make_weight(self.tensors["embedding.weight"], matrix_kind("head.weight", self.weights))
