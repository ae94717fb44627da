"""Fresh memory: it begins on a huge page, is zero, and lives as long as something that lies in it."""

from __future__ import annotations

import gc

import pytest
import torch

from lepton_dist.kernels.cpu.memory import fresh_zeros
from lepton_dist.kernels.cpu.pages import HUGE_PAGE, Pages


@pytest.mark.parametrize("size", [1, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_pages_begin_on_a_huge_page(size: int) -> None:
    pages = Pages(size)
    assert pages.address % HUGE_PAGE == 0
    assert pages.start + size <= len(pages.buffer)
    assert not any(pages.buffer[pages.start : pages.start + size])


@pytest.mark.parametrize("shape", [(5,), (3, HUGE_PAGE), (HUGE_PAGE // 2, 3)])
def test_zeros_stay_what_is_written(shape: tuple[int, ...]) -> None:
    tensors = [fresh_zeros(shape, torch.uint8) for _ in range(3)]
    assert not any(tensor.any() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number + 1)
    gc.collect()  # the pages themselves are kept by their tensors alone
    assert [int(tensor.min()) for tensor in tensors] == [int(tensor.max()) for tensor in tensors] == [1, 2, 3]
