"""The mpi transport: the collectives of one group over non-blocking MPI, which only ever sees bytes.

Two algorithms for all_reduce, both summing in rank order in torch: `gather` (everyone gets all tensors and sums them;
one round, for small ones) and `exchange` (everyone sums its part of all tensors, and parts are gathered; two rounds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.tensors import Scratch, accumulates_in, as_bytes, needs_scratch, reduce_rows
from lepton_dist.comm.transport import AllReduceRoutine, Handle
from lepton_dist.comm.transports.roll_call import RollCall
from lepton_dist.comm.wait import GRACE_S, wait_until
from lepton_dist.errors import RankLostError

# Bytes that one MPI call moves at most. It bounds the scratch buffers, and keeps every count far below the 2**31
# at which MPI libraries begin to fail.
PIECE_BYTES = 64 << 20

# MPI moves a large message piece by piece, one at each Test: no sleeping while it may still be under way. The figure
# is that of a slow network.
_SLOW_BYTES_PER_S = 200e6


class MpiTransport:
    """The collectives and messages of one group over a communicator of its own."""

    name = "mpi"

    def __init__(
        self, comm: MPI.Intracomm, name: str, members: Sequence[int], roll_call: RollCall, patience: Patience
    ) -> None:
        self.algorithms: Mapping[str, tuple[str, ...]] = {"all_reduce": ("exchange", "gather")}
        self._comm = comm
        self._rank, self._size = comm.Get_rank(), comm.Get_size()
        self._group_name, self._members = name, tuple(members)
        self._roll_call, self._patience = roll_call, patience
        self._gathered, self._wide = Scratch(), Scratch()
        self._number = 0
        self.piece_bytes = PIECE_BYTES

    def all_reduce(self, shape: Sequence[int], dtype: torch.dtype, op: str, algorithm: str) -> AllReduceRoutine:
        """A routine that reduces tensors of this shape in place."""
        body = self._gather if algorithm == "gather" else self._exchange
        # `gather` holds size times the tensor, `exchange` about once.
        row_bytes = self.piece_bytes // (self._size if algorithm == "gather" else 1)
        step = max(self._size, row_bytes // dtype.itemsize)

        def routine(tensor: Tensor) -> None:
            flat = tensor.view(-1)
            for low in range(0, flat.numel(), step):
                body(flat[low : low + step], op)

        return routine

    def _gather(self, part: Tensor, op: str) -> None:
        rows = self._gathered.take((self._size, part.numel()), part.dtype)
        self._complete("all_reduce", rows.nbytes, lambda: self._comm.Iallgather(_buffer(part), _buffer(rows)))
        self._reduce(rows, op, part)

    def _exchange(self, part: Tensor, op: str) -> None:
        width = part.dtype.itemsize
        lengths = [part.numel() // self._size + (i < part.numel() % self._size) for i in range(self._size)]
        starts = [sum(lengths[:i]) for i in range(self._size)]
        counts, offsets = [n * width for n in lengths], [n * width for n in starts]
        mine = lengths[self._rank]
        rows = self._gathered.take((self._size, mine), part.dtype)
        received = [mine * width] * self._size, [i * mine * width for i in range(self._size)]
        memory = _buffer(part)
        send, receive = [memory, (counts, offsets), MPI.BYTE], [_buffer(rows), received, MPI.BYTE]
        self._complete("all_reduce", part.nbytes, lambda: self._comm.Ialltoallv(send, receive))
        if mine:
            self._reduce(rows, op, part[starts[self._rank] : starts[self._rank] + mine])
        self._complete("all_reduce", part.nbytes, lambda: self._comm.Iallgatherv(MPI.IN_PLACE, send))

    def all_gather(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        if out.nbytes <= self.piece_bytes:
            self._complete("all_gather", out.nbytes, lambda: self._comm.Iallgather(_buffer(tensor), _buffer(out)))
            return
        for root in range(self._size):
            if root == self._rank:
                out[root].copy_(tensor)
            self._pieces(out[root], root, "all_gather")

    def reduce_scatter(self, out: Tensor, tensor: Tensor, op: str) -> None:
        """See `Transport`."""
        flat = out.view(-1)
        for low, high, send in self._columns(tensor):
            rows = self._gathered.take((self._size, high - low), tensor.dtype)
            self._swap(send, rows, "reduce_scatter")
            self._reduce(rows, op, flat[low:high])

    def all_to_all(self, out: Tensor, tensor: Tensor) -> None:
        """See `Transport`."""
        table = out.view(self._size, -1)
        for low, high, send in self._columns(tensor):
            if high - low == table.shape[1]:
                self._swap(send, table, "all_to_all")
                return
            rows = self._gathered.take((self._size, high - low), tensor.dtype)
            self._swap(send, rows, "all_to_all")
            table[:, low:high].copy_(rows)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """See `Transport`."""
        self._pieces(tensor, root, "broadcast")

    def barrier(self) -> None:
        """See `Transport`."""
        self._complete("barrier", 0, self._comm.Ibarrier)

    def isend(self, tensor: Tensor, to: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        what = f"isend with tag {tag} in group {self._group_name!r} to rank {self._members[to]}"
        return self._message(tensor, what, to, lambda piece: self._comm.Isend(piece, to, tag))

    def irecv(self, tensor: Tensor, source: int, tag: int) -> Handle:
        """See `PointToPoint`."""
        what = f"irecv with tag {tag} in group {self._group_name!r} from rank {self._members[source]}"
        return self._message(tensor, what, source, lambda piece: self._comm.Irecv(piece, source, tag))

    def _message(self, tensor: Tensor, what: str, peer: int, start: Callable[[Any], MPI.Request]) -> MpiHandle:
        memory = as_bytes(tensor)
        # At least one message, so that an empty tensor is still an event.
        lows = range(0, max(memory.numel(), 1), self.piece_bytes)
        try:
            requests = [start(_piece(memory[low : low + self.piece_bytes])) for low in lows]
        except MPI.Exception as error:
            raise _lost(what, error) from error
        return MpiHandle(requests, tensor, self._patience, what, self._roll_call, self._members[peer])

    def _columns(self, tensor: Tensor) -> list[tuple[int, int, Tensor]]:
        """Column ranges of `tensor` as [size, columns], each with the contiguous tensor to send."""
        table = tensor.view(self._size, -1)
        columns = table.shape[1]
        step = max(1, self.piece_bytes // (self._size * tensor.dtype.itemsize))
        return [
            (low, min(low + step, columns), table[:, low : low + step].contiguous()) for low in range(0, columns, step)
        ]

    def _swap(self, send: Tensor, receive: Tensor, operation: str) -> None:
        self._complete(operation, send.nbytes, lambda: self._comm.Ialltoall(_buffer(send), _buffer(receive)))

    def _pieces(self, tensor: Tensor, root: int, operation: str) -> None:
        memory = as_bytes(tensor)
        for low in range(0, memory.numel(), self.piece_bytes):
            piece = memory[low : low + self.piece_bytes].numpy()
            self._complete(operation, piece.nbytes, partial(self._comm.Ibcast, piece, root))

    def _reduce(self, rows: Tensor, op: str, out: Tensor) -> None:
        wide = None
        if needs_scratch(out.dtype, op, self._size):
            wide = self._wide.take(out.shape, accumulates_in(out.dtype))
        reduce_rows(list(rows), op, out, wide)

    def _complete(self, operation: str, num_bytes: int, start: Callable[[], MPI.Request]) -> None:
        """Start one non-blocking operation and wait for it; the buffers live in the caller until then."""
        self._number += 1
        what = f"{operation} number {self._number} of group {self._group_name!r} over mpi"
        self._roll_call.waiting = what
        try:
            request = start()
            wait_until(
                request.Test,
                self._patience,
                lambda: f"{what}; {self._roll_call.missing(self._members)}",
                self._roll_call.answer,
                _grace(num_bytes),
            )
        except MPI.Exception as error:
            raise _lost(what, error) from error
        self._roll_call.waiting = ""


class MpiHandle:
    """A message under way, in one or more pieces."""

    def __init__(
        self, requests: list[MPI.Request], tensor: Tensor, patience: Patience, what: str, roll_call: RollCall, peer: int
    ) -> None:
        self._requests, self._tensor, self._patience = requests, tensor, patience
        self._what, self._roll_call, self._peer = what, roll_call, peer

    def test(self) -> bool:
        """Whether it is complete; makes progress.

        Raises:
            RankLostError: MPI reports that the peer is gone.
        """
        try:
            return bool(MPI.Request.Testall(self._requests))
        except MPI.Exception as error:
            raise _lost(self._what, error) from error

    def wait(self) -> None:
        """Return when it is complete.

        Raises:
            RankLostError: the deadline has passed, or MPI reports that the peer is gone.
        """
        self._roll_call.waiting = self._what
        peer = f"the other side is {self._roll_call.describe(self._peer)}"
        wait_until(
            self.test,
            self._patience,
            lambda: f"{self._what}; {peer}",
            self._roll_call.answer,
            _grace(self._tensor.nbytes),
        )
        self._roll_call.waiting = ""


def _piece(memory: Tensor) -> Any:
    """Bytes on the CPU as numpy's; those on a GPU, for a library that is CUDA-aware, tell their address themselves."""
    return memory.numpy() if memory.is_cpu else memory


def _buffer(tensor: Tensor) -> Any:
    """The tensor's memory for MPI, as bytes."""
    if math.prod(tensor.shape) == 0:
        return bytearray()
    return as_bytes(tensor).numpy()


def _grace(num_bytes: int) -> float:
    return GRACE_S + num_bytes / _SLOW_BYTES_PER_S


def _lost(what: str, error: MPI.Exception) -> RankLostError:
    return RankLostError(f"MPI failed in {what}: {error.Get_error_string()}; a rank or its network is gone")
