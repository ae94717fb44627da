"""Which layers the compiled kernels take whole: RMS norms, rotation, gated SiLU, and weights in our own panels.

So are those of Llama, Mistral, Qwen2 and Qwen3, with biases and with norms of queries and keys where they have them.
"""

from __future__ import annotations

from torch.nn import functional

from lepton_dist.kernels.cpu.layer import LayerNorms, LayerSizes, NativeLayer
from lepton_dist.kernels.cpu.matmul import NativeProduct
from lepton_dist.model.layers import Attention, Linear, Mlp, Norm


def native_layer(
    attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: Mlp, rotated: int
) -> NativeLayer | None:
    """The layer as two compiled calls; None where it is of another kind. `rotated` channels of each head turn."""
    linears = {"qkv": attention.qkv, "output": attention.output, "up": mlp.up, "down": mlp.down}
    products = _products(linears)
    is_plain = attention_norm.bias is None and mlp_norm.bias is None
    is_silu = mlp.is_gated and mlp.activation is functional.silu
    if products is None or not (is_plain and is_silu and rotated):
        return None
    sizes = LayerSizes(
        hidden=attention.qkv.weight.in_features,
        heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        ffn=mlp.down.weight.in_features,
        window=attention.window,
    )
    if not _fit(linears, sizes) or not NativeLayer.takes(sizes, attention_norm.dtype, rotated):
        return None
    heads, heads_eps = None, 0.0
    if attention.q_norm is not None and attention.k_norm is not None:
        heads, heads_eps = (attention.q_norm.weight, attention.k_norm.weight), attention.q_norm.eps
    norms = LayerNorms(attention_norm.weight, attention_norm.eps, mlp_norm.weight, mlp_norm.eps, heads, heads_eps)
    # Those of the other two come after the sums over ranks, which lie between the calls.
    biases = {name: bias for name in ("qkv", "up") if (bias := linears[name].bias) is not None}
    return NativeLayer(sizes, norms, products, biases, attention_norm.dtype)


def _fit(linears: dict[str, Linear], sizes: LayerSizes) -> bool:
    """Whether the matrices are as large as the sizes that were taken from some of them want them."""
    width, heads = sizes.head_dim, sizes.heads
    wanted = {
        "qkv": ((heads + 2 * sizes.kv_heads) * width, sizes.hidden),
        "output": (sizes.hidden, heads * width),
        "up": (2 * sizes.ffn, sizes.hidden),
        "down": (sizes.hidden, sizes.ffn),
    }
    return all((linears[name].weight.out_features, linears[name].weight.in_features) == wanted[name] for name in wanted)


def _products(linears: dict[str, Linear]) -> dict[str, NativeProduct] | None:
    found = {}
    for name, linear in linears.items():
        if linear.weight.native is None:
            return None
        found[name] = linear.weight.native
    return found
