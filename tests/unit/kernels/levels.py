"""What this machine's compiled kernels may use."""

from __future__ import annotations

from lepton_dist.kernels.cpu.native import native_library


def has_tiles() -> bool:
    """Whether there are matrix instructions, and our kernels use them."""
    library = native_library()
    return library is not None and bool(library.lepton_has_tiles())
