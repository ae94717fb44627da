"""How a Triton kernel starts that may start before the one in front of it has ended: see `ahead`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_the_one_before(AHEAD: tl.constexpr):
    """Let the next kernel start, then wait. Before this nothing but weights is read, and nothing written."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(place, AHEAD: tl.constexpr):
    """Fetch the lines of 128 bytes at `place`, pointers of any shape, into the GPU's second cache."""
    if AHEAD:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // no $0", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )
