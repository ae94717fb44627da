"""The carrier of a mailbox over MPI: matched probes, one receive at a time, sends that nobody waits for."""

from __future__ import annotations

from collections import deque

from mpi4py import MPI

from lepton_dist.comm.transports.roll_call import RollCall


class MpiPost:
    """Byte strings between the ranks of a communicator of its own."""

    def __init__(self, comm: MPI.Intracomm, roll_call: RollCall) -> None:
        self._comm = comm
        self._rank = comm.Get_rank()
        self._roll_call = roll_call
        self._sends: list[MPI.Request] = []
        self._to_self: deque[bytes] = deque()
        self._receive: tuple[MPI.Request, int, bytearray] | None = None
        self._status = MPI.Status()

    def send(self, to: int, payload: bytes) -> None:
        """See `Post`."""
        if to == self._rank:
            self._to_self.append(bytes(payload))
            return
        # mpi4py keeps the payload alive through the request.
        self._sends.append(self._comm.Isend([bytes(payload), MPI.BYTE], to))

    def poll(self) -> tuple[int, bytes] | None:
        """See `Post`."""
        if self._sends:
            self.has_unsent()
        if self._to_self:
            return self._rank, self._to_self.popleft()
        if self._receive is None:
            message = self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status)
            if message is None:
                self._roll_call.answer()
                return None
            buffer = bytearray(self._status.Get_count(MPI.BYTE))
            source = self._status.Get_source()
            self._receive = message.Irecv([buffer, MPI.BYTE]), source, buffer
        request, source, buffer = self._receive
        # A large payload needs the sender's help: it may take several polls.
        if not request.Test():
            return None
        self._receive = None
        return source, bytes(buffer)

    def has_unsent(self) -> bool:
        """See `Post`."""
        self._sends = [request for request in self._sends if not request.Test()]
        return bool(self._sends)
