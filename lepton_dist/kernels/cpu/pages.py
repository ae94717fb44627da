"""Fresh memory on huge pages: a tenth faster to stream, and several times faster to touch first. Without torch."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

HUGE_PAGE = 2 << 20
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


class Pages:
    """Fresh memory that begins on a huge page and consists of them as far as the kernel has them.

    It takes memory when it is touched. Tensors over `buffer`, from `start` on, keep it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer = mmap.mmap(-1, size + HUGE_PAGE, flags=_FLAGS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.start = -address % HUGE_PAGE
        self.address = address + self.start
        if _ADVICE is not None:
            with suppress(OSError):  # a kernel without huge pages
                # Only pages that are used whole: the rest would take memory for nothing.
                self.buffer.madvise(_ADVICE, self.start, size - size % HUGE_PAGE)
