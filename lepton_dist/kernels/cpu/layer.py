"""A decoder layer in two calls of `layer.c`: with few tokens Python would take longer than attention."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch

from lepton_dist.kernels.cpu.matmul import NativeProduct
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.paged import PagedTasks, can_attend_with
from lepton_dist.kernels.cpu.pointwise import MAX_HALF
from lepton_dist.kernels.cpu.tensors import KINDS

PRODUCTS = ("qkv", "output", "up", "down")
"""The matmuls of a layer."""


class _Layer(ctypes.Structure):
    """`struct layer` of layer.c."""

    _fields_ = (
        *((f"{name}_{part}", ctypes.c_void_p) for name in PRODUCTS for part in ("matmul", "call")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "ffn", "kind", "window")),
        *((name, ctypes.c_float) for name in ("attention_eps", "mlp_eps")),
    )


class _Places(ctypes.Structure):
    """`struct places` of layer.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "tasks", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("half", "block_tokens", "cache_kind")),
    )


class CachePlaces(Protocol):
    """Where a batch's tokens lie in the cache, as `kernels.attention.PagedBatch` tells."""

    slots: torch.Tensor

    def tasks(self, group: int) -> PagedTasks:
        """The batch's work in attention, for `group` query heads a KV head."""
        ...


@dataclass(frozen=True)
class LayerSizes:
    """This rank's part of a layer; `window` is the keys that a token sees at most, None for all before it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    window: int | None


@dataclass(frozen=True)
class LayerNorms:
    """Weights float32 [hidden] and epsilons of a layer's two RMS norms."""

    attention: torch.Tensor
    attention_eps: float
    mlp: torch.Tensor
    mlp_eps: float


class NativeLayer:
    """One layer: RMS norms, attention with rotation, a gated SiLU MLP, no biases.

    `products` has one for each of `PRODUCTS`; `dtype` is that of the activations. The results are those of the kernels
    called one by one.
    """

    def __init__(
        self, sizes: LayerSizes, norms: LayerNorms, products: dict[str, NativeProduct], dtype: torch.dtype
    ) -> None:
        library = native_library()
        if library is None:
            raise RuntimeError("the compiled kernels are not there: ask `native_library` first")
        self._attention, self._mlp = library.lepton_attention_half, library.lepton_mlp_half
        self._kept = norms, products  # whose memory the structure points to
        self._group, self._dtype, self._places = sizes.heads // sizes.kv_heads, dtype, _Places()
        self._layer = _Layer(
            **{f"{name}_matmul": product.function for name, product in products.items()},
            **{f"{name}_call": product.call for name, product in products.items()},
            attention_norm=norms.attention.data_ptr(),
            mlp_norm=norms.mlp.data_ptr(),
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            dim=sizes.head_dim,
            ffn=sizes.ffn,
            kind=KINDS[dtype],
            window=sizes.window or 0,
            attention_eps=norms.attention_eps,
            mlp_eps=norms.mlp_eps,
        )
        self._address, self._places_address = ctypes.addressof(self._layer), ctypes.addressof(self._places)

    @staticmethod
    def takes(sizes: LayerSizes, dtype: torch.dtype, rotated: int) -> bool:
        """Whether the kernels are there and take these shapes; `rotated` channels of each head turn."""
        is_whole = sizes.kv_heads > 0 and sizes.heads % sizes.kv_heads == 0
        heads = sizes.heads, sizes.kv_heads, sizes.head_dim
        return dtype in KINDS and is_whole and rotated <= 2 * MAX_HALF and can_attend_with(*heads)

    @staticmethod
    def can_enter(arenas: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether the kernels take keys and values of this dtype."""
        return arenas[0].dtype in KINDS

    def attention(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        arenas: tuple[torch.Tensor, torch.Tensor],
        places: CachePlaces,
    ) -> torch.Tensor:
        """hidden float32 [tokens, hidden] += delta, in place -> what attention adds, still to be summed over ranks.

        angles: cos and sin float32 [tokens, 1, dim / 2]; arenas: keys and values of the layer that it `can_enter`.
        """
        result = torch.empty(hidden.shape, dtype=self._dtype)
        at, (cos, sin), (keys, values) = self._places, angles, arenas
        at.cos, at.sin, at.slots = cos.data_ptr(), sin.data_ptr(), places.slots.data_ptr()
        at.tasks, at.keys, at.values = places.tasks(self._group).address, keys.data_ptr(), values.data_ptr()
        at.half, at.block_tokens, at.cache_kind = cos.shape[-1], keys.shape[2], KINDS[keys.dtype]
        before = None if delta is None else delta.data_ptr()
        rest = hidden.data_ptr(), before, result.data_ptr(), hidden.shape[0], torch.get_num_threads()
        if self._attention(self._address, self._places_address, *rest):
            raise _no_memory(hidden)
        return result

    def mlp(self, hidden: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """hidden += delta, in place -> what the MLP adds, still to be summed over ranks, in the place of `delta`."""
        place = delta.data_ptr()
        if self._mlp(self._address, hidden.data_ptr(), place, place, hidden.shape[0], torch.get_num_threads()):
            raise _no_memory(hidden)
        return delta


def _no_memory(hidden: torch.Tensor) -> MemoryError:
    return MemoryError(f"no memory for the activations of {hidden.shape[0]} tokens in a layer")
