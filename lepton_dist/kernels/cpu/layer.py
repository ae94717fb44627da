"""A decoder layer in two calls of `layer.c`: with few tokens Python would take longer than attention."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import ref

import torch

from lepton_dist.kernels.cpu.matmul import NativeProduct
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.kernels.cpu.paged import PagedTasks, can_attend_with
from lepton_dist.kernels.cpu.pointwise import MAX_HALF, are_arenas
from lepton_dist.kernels.cpu.structures import Layer, pack_half
from lepton_dist.kernels.cpu.tensors import KINDS, is_dense
from lepton_dist.kernels.gradients import refuse_gradient


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
    """Weights float32 [hidden] and epsilons of a layer's two RMS norms; [head_dim] for queries and keys, or None."""

    attention: torch.Tensor
    attention_eps: float
    mlp: torch.Tensor
    mlp_eps: float
    heads: tuple[torch.Tensor, torch.Tensor] | None = None
    heads_eps: float = 0.0


class NativeLayer:
    """One layer: RMS norms, attention with rotation, a gated SiLU MLP.

    `products` has one for each of `PRODUCTS`, `biases` those of qkv and up that there are; `dtype` is that of the
    activations. The results are those of the kernels called one by one.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        norms: LayerNorms,
        products: dict[str, NativeProduct],
        biases: dict[str, torch.Tensor],
        dtype: torch.dtype,
    ) -> None:
        library = native_library()
        if library is None:
            raise RuntimeError("the compiled kernels are not there: ask `native_library` first")
        self._attention, self._mlp = library.lepton_attention_half, library.lepton_mlp_half
        for weight in (norms.attention, norms.mlp):
            if not is_dense(weight, torch.float32, sizes.hidden):
                found = f"{weight.dtype} {tuple(weight.shape)}"
                raise ValueError(f"a layer of {sizes.hidden} channels takes norms of float32, not {found}")
        widths = {"qkv": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim, "up": 2 * sizes.ffn}
        wide = {name: bias.detach().float().contiguous() for name, bias in biases.items()}
        q_norm, k_norm = norms.heads or (None, None)
        vectors = [(wide[name], widths[name]) for name in wide]
        vectors += [(norm, sizes.head_dim) for norm in norms.heads or ()]
        for vector, width in vectors:
            if not is_dense(vector, torch.float32, width):
                raise ValueError(f"a bias or a norm of {width} channels is {vector.dtype} {tuple(vector.shape)}")
        self._kept = norms, products, wide  # whose memory the structure points to
        self._sizes, self._group, self._dtype = sizes, sizes.heads // sizes.kv_heads, dtype
        self._layer = Layer(
            **{f"{name}_matmul": product.function for name, product in products.items()},
            **{f"{name}_call": product.call for name, product in products.items()},
            attention_norm=norms.attention.data_ptr(),
            mlp_norm=norms.mlp.data_ptr(),
            **{f"{name}_bias": bias.data_ptr() for name, bias in wide.items()},
            q_norm=None if q_norm is None else q_norm.data_ptr(),
            k_norm=None if k_norm is None else k_norm.data_ptr(),
            hidden=sizes.hidden,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            dim=sizes.head_dim,
            ffn=sizes.ffn,
            kind=KINDS[dtype],
            window=sizes.window or 0,
            attention_eps=norms.attention_eps,
            mlp_eps=norms.mlp_eps,
            head_eps=norms.heads_eps,
        )
        self._address = ctypes.addressof(self._layer)
        self._known: tuple[Callable[[], torch.Tensor | None], Callable[[], torch.Tensor | None]] = (_none, _none)

    @staticmethod
    def takes(sizes: LayerSizes, dtype: torch.dtype, rotated: int) -> bool:
        """Whether the kernels are there and take these shapes; `rotated` channels of each head turn."""
        is_whole = sizes.kv_heads > 0 and sizes.heads % sizes.kv_heads == 0
        heads = sizes.heads, sizes.kv_heads, sizes.head_dim
        return dtype in KINDS and is_whole and rotated <= 2 * MAX_HALF and can_attend_with(*heads)

    def can_enter(self, arenas: tuple[torch.Tensor, torch.Tensor]) -> bool:
        """Whether the kernels take these keys and values."""
        keys, values = arenas
        known_keys, known_values = self._known
        if keys is known_keys() and values is known_values():
            return True
        sizes = self._sizes
        fits = keys.dim() == 4 and keys.shape[1] == sizes.kv_heads and keys.shape[3] == sizes.head_dim
        if not fits or keys.dtype not in KINDS or not are_arenas(keys, values):
            return False
        self._known = ref(keys), ref(values)  # the same in every step
        return True

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

        Raises:
            ValueError: a tensor is not as it must be.
            GradientError: autograd follows `hidden`.
        """
        rows = self._check(hidden, delta)
        (cos, sin), (keys, values), slots = angles, arenas, places.slots
        half, (blocks, _, block_tokens, _) = cos.shape[-1], keys.shape
        tasks = places.tasks(self._group)
        if not tasks.knows(rows, cos, sin, slots) or 2 * half > self._sizes.head_dim:
            raise ValueError(
                f"a layer of {rows} rows was given angles {tuple(cos.shape)} of {cos.dtype} for heads of "
                f"{self._sizes.head_dim}, and slots {tuple(slots.shape)} of {slots.dtype}"
            )
        result = torch.empty(hidden.shape, dtype=self._dtype)
        arguments = pack_half(
            self._address,
            hidden.data_ptr(),
            0 if delta is None else delta.data_ptr(),
            result.data_ptr(),
            rows,
            cos.data_ptr(),
            sin.data_ptr(),
            half,
            slots.data_ptr(),
            *tasks.for_shapes(rows, blocks, block_tokens),
            keys.data_ptr(),
            values.data_ptr(),
            blocks,
            block_tokens,
            KINDS[keys.dtype],
            torch.get_num_threads(),
        )
        if problem := self._attention(arguments):
            raise _no_memory(hidden) if problem == 1 else IndexError(f"a slot is outside of the {blocks} blocks")
        return result

    def mlp(self, hidden: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """hidden += delta, in place -> what the MLP adds, still to be summed over ranks, in the place of `delta`.

        Raises:
            ValueError: a tensor is not as it must be.
            GradientError: autograd follows `hidden`.
        """
        rows, place = self._check(hidden, delta), delta.data_ptr()
        if self._mlp(self._address, hidden.data_ptr(), place, place, rows, torch.get_num_threads()):
            raise _no_memory(hidden)
        return delta

    def _check(self, hidden: torch.Tensor, delta: torch.Tensor | None) -> int:
        shape = hidden.shape
        fits = len(shape) == 2 and shape[1] == self._sizes.hidden and hidden.is_contiguous() and hidden.is_cpu
        if fits and delta is not None:
            fits = delta.dtype == self._dtype and delta.is_contiguous() and delta.shape == shape and delta.is_cpu
        if not fits or hidden.dtype != torch.float32:
            raise ValueError(
                f"a layer of {self._sizes.hidden} channels takes contiguous float32 [tokens, channels] on the CPU and "
                f"adds as many of {self._dtype}; it was given {hidden.dtype} {tuple(hidden.shape)}"
                + ("" if delta is None else f" and {delta.dtype} {tuple(delta.shape)}")
            )
        if hidden.requires_grad:
            refuse_gradient(hidden, "a layer in two calls", "set `native` to None to train")
        return shape[0]


def _none() -> None:
    """No tensor is known yet."""


def _no_memory(hidden: torch.Tensor) -> MemoryError:
    return MemoryError(f"no memory for the activations of {hidden.shape[0]} tokens in a layer")
