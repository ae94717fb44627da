"""The staged transport: GPU tensors through host memory, for ranks that share no NCCL.

Two ranks on one GPU, or a GPU rank and a CPU rank: a tensor is copied to pinned host memory on the current stream, the
group's CPU transport carries it, and it is copied back on the current stream. What travels is what a CPU rank would
send, so the other side need not know. Messages overlap: a send waits for its copy without stopping its rank, and a
receive is posted before there is anything to copy. Collectives wait for their copy: they cannot be captured in graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import ReduceOp
from lepton_dist.comm.transport import AllReduceRoutine, Handle
from lepton_dist.comm.transports.courier import Courier, LateMessage
from lepton_dist.comm.wait import wait_until


class Copy:
    """A copy of a tensor in host memory that is on its way; on the CPU it is there at once."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self.host = host_like(tensor)
        self.host.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def is_there(self) -> bool:
        """Whether `host` may be read; asks the GPU, and waits for nothing."""
        return self._event is None or self._event.query()


def host_like(tensor: Tensor) -> Tensor:
    """Uninitialised host memory for a tensor's values: pinned for a GPU's, so that copies need not wait.

    torch keeps the memory until the copies that use it are over, even if nobody else does.
    """
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class StagedTransport:
    """The collectives of one group for tensors that are not on the CPU."""

    name = "staged"

    def __init__(self, group: Group, patience: Patience) -> None:
        self.algorithms: Mapping[str, tuple[str, ...]] = {}
        self._group, self._patience = group, patience

    def all_reduce(self, shape: Sequence[int], dtype: torch.dtype, op: str, algorithm: str) -> AllReduceRoutine:
        """A routine that reduces tensors of this shape in place."""
        known: ReduceOp = "max" if op == "max" else "sum"

        def routine(tensor: Tensor) -> None:
            tensor.copy_(self._group.all_reduce(self._on_host(tensor, "all_reduce"), known), non_blocking=True)

        return routine

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        self._bring(self._group.all_gather(self._on_host(tensor, "all_gather")), out)

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: str) -> None:
        """See `Transport`."""
        known: ReduceOp = "max" if op == "max" else "sum"
        self._bring(self._group.reduce_scatter(self._on_host(tensor, "reduce_scatter"), known), out)

    def all_to_all(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        self._bring(self._group.all_to_all(self._on_host(tensor, "all_to_all")), out)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """See `Transport`."""
        self._bring(self._group.broadcast(self._on_host(tensor, "broadcast"), root), tensor)

    def barrier(self) -> None:
        """See `Transport`."""
        self._group.barrier()

    def _on_host(self, tensor: Tensor, operation: str) -> Tensor:
        copy = Copy(tensor)
        what = f"the GPU to come to the {operation} of group {self._group.name!r}"
        wait_until(copy.is_there, self._patience, lambda: what)
        return copy.host

    @staticmethod
    def _bring(values: Tensor, out: Tensor) -> None:
        # The group's results lie in ordinary memory: the copy reads them before it returns.
        out.copy_(values)


class StagedReceive:
    """A receive into host memory, which is then copied to where it belongs, on the stream current at that time."""

    def __init__(
        self, group: Group, tensor: Tensor, source: int, tag: int, courier: Courier, patience: Patience
    ) -> None:
        self._group, self._tensor, self._courier, self._patience = group, tensor, courier, patience
        self._host = host_like(tensor)
        self._inner = group.irecv(self._host, source, tag)
        self._is_done = False

    def test(self) -> bool:
        """See `Handle`."""
        self._courier.progress()
        if not self._is_done and self._inner.test():
            self._bring()
        return self._is_done

    def wait(self) -> None:
        """See `Handle`: what follows on the current stream finds the values."""
        what = f"the GPU to come to the sends before a receive in group {self._group.name!r}"
        wait_until(lambda: self.test() or not self._courier.progress(), self._patience, lambda: what)
        if not self._is_done:
            self._inner.wait()
            self._bring()

    def _bring(self) -> None:
        self._tensor.copy_(self._host, non_blocking=True)
        self._is_done = True


class StagedMessages:
    """Messages of one group for tensors that are not on the CPU. Those of one pair start in the order of sending."""

    def __init__(self, group: Group, courier: Courier, patience: Patience) -> None:
        self._group, self._courier, self._patience = group, courier, patience

    def isend(self, tensor: Tensor, to: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        copy = Copy(tensor)
        what = f"a send of group {self._group.name!r}"
        start = partial(self._group.isend, copy.host, to, tag)
        return LateMessage(what, copy.is_there, start, self._courier, self._patience)

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        return StagedReceive(self._group, tensor, source, tag, self._courier, self._patience)
