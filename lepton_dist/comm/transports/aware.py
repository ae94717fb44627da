"""CUDA-aware messages: MPI itself reads and writes the GPU's memory, where the library says that it can.

A message starts when the stream has come to it: a send when its values are there, and a receive when nothing before it
still uses the memory. What travels is what a staged or a CPU rank would send, so the other side need not know.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import Handle, PointToPoint
from lepton_dist.comm.transports.courier import Courier, LateMessage


class AwareMessages:
    """Messages of one group, over those of its MPI communicator. They start in the order of their calls."""

    def __init__(self, messages: PointToPoint, name: str, courier: Courier, patience: Patience) -> None:
        self._messages, self._name, self._courier, self._patience = messages, name, courier, patience

    def isend(self, tensor: Tensor, to: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        return self._late("a send", tensor, partial(self._messages.isend, tensor, to, tag))

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        return self._late("a receive", tensor, partial(self._messages.irecv, tensor, source, tag))

    def _late(self, what: str, tensor: Tensor, begin: partial[Handle]) -> LateMessage:
        is_ready = _passed(tensor.device) if tensor.is_cuda else _at_once
        return LateMessage(f"{what} of group {self._name!r}", is_ready, begin, self._courier, self._patience)


def _passed(device: torch.device) -> partial[bool]:
    """Asks whether the GPU has done all that is on its current stream now."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return partial(event.query)


def _at_once() -> bool:
    return True
