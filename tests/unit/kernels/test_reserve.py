"""Memory that is touched ahead: what is given out is zero, apart from the rest, and never written to again."""

from __future__ import annotations

import ctypes
import mmap
import time
from pathlib import Path

import pytest
import torch

from lepton_dist.kernels.cpu.memory import lasting_zeros
from lepton_dist.kernels.cpu.reserve import HUGE_PAGE, Reserve, reserve


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


def address_of(room: tuple[mmap.mmap, int]) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(room[0])) + room[1]


def test_pieces_begin_on_huge_pages_and_do_not_overlap() -> None:
    held = Reserve()
    held.begin(8 * HUGE_PAGE + 5)
    rooms = [held.take(size) for size in (1, HUGE_PAGE, 2 * HUGE_PAGE + 1)]
    places = [address_of(room) for room in rooms if room is not None]
    assert [place % HUGE_PAGE for place in places] == [0, 0, 0]
    assert [place - places[0] for place in places] == [0, HUGE_PAGE, 2 * HUGE_PAGE]
    assert held.take(4 * HUGE_PAGE) is None  # 3 are left
    assert held.take(3 * HUGE_PAGE) is not None
    assert held.take(1) is None
    held.close()


@pytest.mark.parametrize("pause_s", [0, 0.05])
def test_what_is_given_out_is_zero_and_stays_as_it_is_written(pause_s: float) -> None:
    held = Reserve()
    held.begin(256 * HUGE_PAGE)  # takes longer than what follows: some of it is taken before it was touched
    tensors = []
    for number in range(128):
        room = held.take(2 * HUGE_PAGE)
        assert room is not None
        tensors.append(torch.frombuffer(room[0], dtype=torch.uint8, count=2 * HUGE_PAGE, offset=room[1]))
        assert not tensors[-1].any()
        tensors[-1].fill_(number + 1)
        time.sleep(pause_s if number < 3 else 0)
    held.close()
    assert all(bool((tensor == number + 1).all()) for number, tensor in enumerate(tensors))


def test_what_was_not_taken_is_given_back() -> None:
    held, before = Reserve(), resident_bytes()
    held.begin(64 * HUGE_PAGE)
    deadline_s = time.monotonic() + 30
    while held.touched_bytes < 64 * HUGE_PAGE and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert held.touched_bytes == 64 * HUGE_PAGE
    room = held.take(HUGE_PAGE)
    assert room is not None
    kept = torch.frombuffer(room[0], dtype=torch.uint8, count=HUGE_PAGE, offset=room[1]).fill_(7)
    assert resident_bytes() - before >= 64 * HUGE_PAGE
    held.close()
    assert resident_bytes() - before < 32 * HUGE_PAGE  # one is kept; the allocator may have taken some meanwhile
    assert held.touched_bytes == 0 and held.take(1) is None
    assert bool((kept == 7).all())


def test_without_a_reserve_there_is_memory_all_the_same() -> None:
    assert reserve().take(HUGE_PAGE) is None
    assert not lasting_zeros((3, HUGE_PAGE), torch.uint8).any()


def test_lasting_zeros_come_from_the_reserve_while_it_lasts() -> None:
    reserve().begin(4 * HUGE_PAGE)
    try:
        small, large = lasting_zeros((5,), torch.float32), lasting_zeros((2, HUGE_PAGE), torch.uint8)
        large.fill_(1)
        again = lasting_zeros((HUGE_PAGE,), torch.bfloat16)
        assert again.data_ptr() == large.data_ptr() + 2 * HUGE_PAGE and not again.any()
        assert not small.any() and reserve().take(HUGE_PAGE) is None  # a small one took nothing, and now it is empty
    finally:
        reserve().close()
