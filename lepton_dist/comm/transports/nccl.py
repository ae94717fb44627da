"""The nccl transport: GPU tensors of one group through CuPy's NCCL, on torch's current stream, by pointer.

Nothing is copied and nothing waits: an operation is put on the stream, and what is put there later finds its result.
So collectives can be captured in CUDA graphs. NCCL reports a lost peer only when asked: `failure` asks, and whoever
waits for the GPU (`comm.gpu_wait`) does so while it waits. Imported only where a rank computes on a GPU.

Sums of three or more 16-bit floats travel in float32 and are rounded once. NCCL adds in an order of its own choice, not
in the order of ranks; every rank gets the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cupy.cuda import nccl
from torch import Tensor

from lepton_dist.comm.group import Group
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import needs_scratch
from lepton_dist.comm.transport import AllReduceRoutine, Handle
from lepton_dist.comm.wait import wait_until
from lepton_dist.errors import RankLostError

ID_BYTES = 128
# What NCCL can add up, and how it names it. Everything else travels as bytes.
_TYPES: Mapping[torch.dtype, int] = {
    torch.int8: nccl.NCCL_INT8,
    torch.uint8: nccl.NCCL_UINT8,
    torch.int32: nccl.NCCL_INT32,
    torch.int64: nccl.NCCL_INT64,
    torch.float16: nccl.NCCL_FLOAT16,
    torch.bfloat16: nccl.NCCL_BFLOAT16,
    torch.float32: nccl.NCCL_FLOAT32,
    torch.float64: nccl.NCCL_FLOAT64,
}
_OPS: Mapping[str, int] = {"sum": nccl.NCCL_SUM, "max": nccl.NCCL_MAX}


def share_id(group: Group) -> bytes:
    """A new unique id, made by the group's first rank and the same on all. Collective over the group; needs no GPU.

    Raises:
        RankLostError: a member did not come before the deadline.
    """
    made = nccl.get_unique_id() if group.rank == 0 else bytes(ID_BYTES)
    words = torch.frombuffer(bytearray(made), dtype=torch.uint8)
    return bytes(group.broadcast(words, root=0).tolist())


def join(group: Group, device: torch.device, patience: Patience) -> NcclLink:
    """The NCCL communicator of a group whose members each have a GPU of their own. Collective over the group.

    NCCL blocks until all have come, so it does in a thread of its own, and this one keeps the deadline.

    Raises:
        RankLostError: a member did not come before the deadline, or NCCL failed.
    """
    unique_id = share_id(group)
    made: list[Any] = []
    errors: list[BaseException] = []

    def start() -> None:
        try:
            torch.cuda.set_device(device)  # a thread has a current device of its own
            made.append(nccl.NcclCommunicator(group.size, unique_id, group.rank))
        except BaseException as error:  # handed to the caller below, whatever it is
            errors.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    what = f"NCCL to join the ranks {list(group.members)} of group {group.name!r}"
    wait_until(lambda: not thread.is_alive(), patience, lambda: what)
    if errors:
        raise RankLostError(f"{what}: {errors[0]} (NCCL_DEBUG=INFO says more)") from errors[0]
    return NcclLink(made[0], group, device)


class NcclLink:
    """A communicator, and whether it is sound."""

    def __init__(self, comm: Any, group: Group, device: torch.device) -> None:
        self.comm, self.group, self.device = comm, group, device
        self._is_open = True

    def failure(self) -> str:
        """What NCCL found wrong since the start, in words; empty when nothing is. Waits for nothing."""
        if not self._is_open:
            return ""
        try:
            self.comm.check_async_error()
        except nccl.NcclError as error:
            return f"NCCL failed in group {self.group.name!r} of ranks {list(self.group.members)}: {error}"
        return ""

    def abort(self) -> None:
        """Take its kernels off the GPU: after a failure they would wait for ever, and the process with them."""
        if self._is_open:
            self._is_open = False
            self.comm.abort()

    def close(self) -> None:
        """Give it back; nothing may be under way."""
        if self._is_open:
            self._is_open = False
            self.comm.destroy()

    def stream(self) -> int:
        """The stream that is current, as NCCL takes it."""
        return int(torch.cuda.current_stream(self.device).cuda_stream)


def _as_nccl(tensor: Tensor) -> tuple[int, int]:
    """How many of which type move a contiguous tensor."""
    known = _TYPES.get(tensor.dtype)
    return (tensor.numel(), known) if known is not None else (tensor.nbytes, nccl.NCCL_UINT8)


class NcclTransport:
    """The collectives of one group over its communicator."""

    name = "nccl"

    def __init__(self, link: NcclLink) -> None:
        self.algorithms: Mapping[str, tuple[str, ...]] = {}
        self._link = link
        self._rank, self._size = link.group.rank, link.group.size

    def all_reduce(self, shape: Sequence[int], dtype: torch.dtype, op: str, algorithm: str) -> AllReduceRoutine:
        """A routine that reduces tensors of this shape in place."""
        is_widened = needs_scratch(dtype, op, self._size)

        def routine(tensor: Tensor) -> None:
            wide = tensor.float() if is_widened else tensor
            count, kind = _as_nccl(wide)
            pointer = wide.data_ptr()
            self._link.comm.allReduce(pointer, pointer, count, kind, _OPS[op], self._link.stream())
            if is_widened:
                tensor.copy_(wide)

        return routine

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        count, kind = _as_nccl(tensor)
        self._link.comm.allGather(tensor.data_ptr(), out.data_ptr(), count, kind, self._link.stream())

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: str) -> None:
        """See `Transport`."""
        is_widened = needs_scratch(out.dtype, op, self._size)
        source = tensor.float() if is_widened else tensor
        target = torch.empty(out.shape, dtype=source.dtype, device=out.device) if is_widened else out
        count, kind = _as_nccl(target)
        pointers = source.data_ptr(), target.data_ptr()
        self._link.comm.reduceScatter(*pointers, count, kind, _OPS[op], self._link.stream())
        if is_widened:
            out.copy_(target)

    def all_to_all(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`: one group call, in which all rows move at once."""
        count, kind = _as_nccl(tensor[0])
        comm, stream = self._link.comm, self._link.stream()
        nccl.groupStart()
        for peer in range(self._size):
            comm.send(tensor[peer].data_ptr(), count, kind, peer, stream)
            comm.recv(out[peer].data_ptr(), count, kind, peer, stream)
        nccl.groupEnd()

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """See `Transport`."""
        count, kind = _as_nccl(tensor)
        self._link.comm.bcast(tensor.data_ptr(), count, kind, root, self._link.stream())

    def barrier(self) -> None:
        """See `Transport`; it is the stream that waits."""
        self.all_reduce([1], torch.int32, "sum", "direct")(torch.zeros(1, dtype=torch.int32, device=self._link.device))


class NcclHandle:
    """A message on the stream of its link. It keeps the buffer."""

    def __init__(self, link: NcclLink, tensor: Tensor, event: torch.cuda.Event) -> None:
        self._link, self._tensor, self._event = link, tensor, event

    def test(self) -> bool:
        """See `Handle`.

        Raises:
            RankLostError: NCCL reports that the peer is gone.
        """
        if self._event.query():
            return True
        failure = self._link.failure()
        if failure:
            self._link.abort()
            raise RankLostError(failure)
        return False

    def wait(self) -> None:
        """What follows on the current stream waits for the message; this rank does not."""
        torch.cuda.current_stream(self._link.device).wait_event(self._event)


class NcclMessages:
    """Messages of a group of two over its communicator, on a stream of its own.

    NCCL runs the operations of a communicator in one order, so a receive that waits holds up every send behind it:
    such a group carries messages in one direction only. The buffers come from torch's allocator, which is told that
    another stream uses them.
    """

    def __init__(self, link: NcclLink) -> None:
        self._link = link
        self._stream = torch.cuda.Stream(link.device)

    def isend(self, tensor: Tensor, to: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        return self._post(tensor, self._link.comm.send, to)

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        return self._post(tensor, self._link.comm.recv, source)

    def _post(self, tensor: Tensor, call: Any, peer: int) -> Handle:
        count, kind = _as_nccl(tensor)
        # What is sent must have been computed, and what is overwritten have been read.
        self._stream.wait_stream(torch.cuda.current_stream(self._link.device))
        tensor.record_stream(self._stream)
        if count:
            call(tensor.data_ptr(), count, kind, peer, self._stream.cuda_stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        return NcclHandle(self._link, tensor, event)
