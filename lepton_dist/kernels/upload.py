"""Small arrays of the host to where the computation is, without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def upload(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A tensor of the array's values on `device`: on the CPU the array's own memory, else a copy on its way.

    The copy goes through pinned memory on the current stream: neither this process nor the GPU waits for the other.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
