"""Memory for weights that a thread touches while the process still imports what will fill it. Without torch.

A page costs most when it is touched first: the kernel clears it, and on a virtual machine the host has to find it.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from threading import Thread

HUGE_PAGE = 2 << 20
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
_STEP = 16 * HUGE_PAGE


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


class Reserve:
    """Pages that are touched ahead of need, and given out piece by piece."""

    def __init__(self) -> None:
        self._pages: Pages | None = None
        self._thread: Thread | None = None
        self._taken = self._touched = 0

    @property
    def touched_bytes(self) -> int:
        """Memory that this process holds already and that nothing is in yet."""
        return max(self._touched - self._taken, 0)

    def begin(self, num_bytes: int) -> None:
        """Touch so many bytes, rounded down to huge pages, in a thread that holds no lock of Python's meanwhile."""
        size = num_bytes // HUGE_PAGE * HUGE_PAGE
        if size and self._pages is None:
            self._pages = Pages(size)
            self._thread = Thread(target=self._touch, args=(self._pages,), name="lepton-reserve", daemon=True)
            self._thread.start()

    def take(self, num_bytes: int) -> tuple[mmap.mmap, int] | None:
        """Room for so many zeros: a buffer and where in it, on a huge page; None when there is not so much left."""
        pages, size = self._pages, -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
        if pages is None or self._taken + size > pages.size:
            return None
        first, self._taken = pages.start + self._taken, self._taken + size
        if self._taken > self._touched:
            self._stop()  # it would write where others write; they touch the rest
        return pages.buffer, first

    def close(self) -> None:
        """Give back what was not taken; nothing is given out from here on."""
        self._stop()
        pages, self._pages = self._pages, None
        if pages is not None and self._taken < pages.size:
            pages.buffer.madvise(mmap.MADV_DONTNEED, pages.start + self._taken, pages.size - self._taken)
        self._taken = self._touched = 0

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def _touch(self, pages: Pages) -> None:
        """By writing: MADV_POPULATE_WRITE would hold a lock that every import which maps a library waits for."""
        while self._thread is not None and self._touched < pages.size:
            step = min(_STEP, pages.size - self._touched)
            ctypes.memset(pages.address + self._touched, 0, step)
            self._touched += step


@cache
def reserve() -> Reserve:
    """That of this process; empty until something begins it."""
    return Reserve()
