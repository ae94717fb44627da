"""Compiles every Triton kernel down to PTX for a GPU that need not be there: ``python -m ... CAPABILITY``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lepton_dist.kernels.cuda import products, triton_attention, triton_pointwise, triton_product
from lepton_dist.kernels.cuda.fused import tile_tokens

SHARED_BYTES = 99 << 10  # what a program may take on the smallest of these GPUs
_I, _F = "i32", "fp32"


def signatures(dtype: str) -> list[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel with the types of its arguments, and its constants, as Llama 3 8B has them; caches of `dtype`."""
    x = f"*{dtype}"
    norm = {"hidden": "*fp32", "delta": x, "weight": "*fp32", "out": x, "dim": _I, "eps": _F}
    gated = {"x": x, "out": x, "ffn": _I}
    tensors = dict.fromkeys(("turned", "value", "query", "keys", "values"), x)
    strides = dict.fromkeys(("turned_stride", "value_stride"), _I)
    numbers = dict.fromkeys(("heads", "kv_heads", "block_tokens", "dim", "half"), _I)
    enter = {**tensors, "cos": "*fp32", "sin": "*fp32", "slots": "*i64", **strides, **numbers}
    decode = {
        **dict.fromkeys(("query", "keys", "values"), x),
        **dict.fromkeys(("tables", "lengths"), "*i32"),
        **dict.fromkeys(("partial", "weights"), "*fp32"),
        "scale": _F,
        **dict.fromkeys(("window", "query_stride", "table_stride", "kv_heads", "group", "dim", "num_splits"), _I),
    }
    combine = {"partial": "*fp32", "weights": "*fp32", "out": x, "num_splits": _I, "dim": _I}
    tokens = tile_tokens(torch.bfloat16 if dtype == "bf16" else torch.float32)
    tile = {"BLOCK_TOKENS": 16, "HAS_WINDOW": True, "GROUP": 16, "DIM": 256, "TILE": tokens}  # the widest head
    return [
        (triton_pointwise.add_rms_norm_kernel, norm, {"HAS_DELTA": True, "BLOCK": 4096}),
        (triton_pointwise.gated_silu_kernel, gated, {"BLOCK": 1024}),
        (triton_pointwise.enter_cache_kernel, enter, {"HAS_ROPE": True, "DIM": 128, "HEADS": 8}),
        (triton_attention.decode_kernel, decode, tile),
        (triton_attention.combine_kernel, combine, {"SPLITS": 32, "DIM": 128}),
    ]


def product_signatures(dtype: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """The same of the kernels for few tokens, for each number of them."""
    x = f"*{dtype}"
    add = {"x": x, "weight": x, "hidden": "*fp32", "dim": _I, "out": _I}
    normed = {"hidden": "*fp32", "gain": "*fp32", "weight": x, "dim": _I, "eps": _F}
    gated = {**normed, "out": x, "ffn": _I}
    arenas = dict.fromkeys(("query", "keys", "values"), x)
    numbers = dict.fromkeys(("heads", "kv_heads", "block_tokens", "head_dim", "half"), _I)
    enter = {**normed, **arenas, "cos": "*fp32", "sin": "*fp32", "slots": "*i64", **numbers}
    for tokens in (1, 2):
        kinds = ((triton_product.add_product_kernel, add, False), (triton_product.gated_product_kernel, gated, True))
        for kernel, types, has_norm in (*kinds, (triton_product.enter_product_kernel, enter, True)):
            tile = products.tile_of(tokens, has_norm)
            places = {"TOKENS": tokens, "ROWS": tile.rows, "BLOCK": tile.block, "STAGES": tile.stages}
            yield kernel, types, places


def main(capability: int) -> None:
    for dtype in ("bf16", "fp32"):
        for kernel, types, constants in (*signatures(dtype), *product_signatures(dtype)):
            if dtype == "fp32" and kernel.__module__ == triton_product.__name__:
                continue  # only 16-bit weights go through them
            if dtype == "fp32" and kernel in (triton_pointwise.gated_silu_kernel, triton_attention.combine_kernel):
                continue  # they differ in a conversion only
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            # As at a launch: tensors begin at multiples of 16 bytes, and these sizes are multiples of 16.
            aligned = [name for name, kind in types.items() if kind.startswith("*") or name in {"dim", "ffn"}]
            attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
            source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert ".target sm_" in made.asm["ptx"] and made.metadata.shared <= SHARED_BYTES
            print(f"compiled {kernel.__name__} {dtype} for sm_{capability}: {sorted(made.asm)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
