"""The roll call: who among the ranks still answers, and what each one waits for.

A non-blocking MPI collective does not say who is missing. So a rank whose deadline has passed asks the others; each
of them answers from inside its own waits, with the operation that it waits for.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

from mpi4py import MPI

from lepton_dist.comm.patience import Patience
from lepton_dist.comm.wait import wait_until
from lepton_dist.errors import RankLostError

_ASK, _ANSWER, _MEET = 1, 2, 3
_ANSWER_SECONDS = 1.0


class RollCall:
    """Questions and answers over a communicator of its own. `waiting` is what this rank waits for, in words."""

    def __init__(self, comm: MPI.Intracomm, hosts: Sequence[str], patience: Patience) -> None:
        self._comm = comm
        self._rank = comm.Get_rank()
        self._hosts = tuple(hosts)
        self._patience = patience
        self._sends: list[MPI.Request] = []
        self.waiting = ""

    def describe(self, rank: int) -> str:
        """A rank as error messages name it."""
        return f"rank {rank} (host {self._hosts[rank]})"

    def answer(self) -> None:
        """Answer whoever asks. Called from idle waits; it also lets MPI make progress on everything else."""
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, _ASK, status):
            source = status.Get_source()
            self._comm.Recv([bytearray(), MPI.BYTE], source, _ASK)
            # The request keeps the buffer: mpi4py holds a reference until it is done.
            self._sends.append(self._comm.Isend([self.waiting.encode(), MPI.BYTE], source, _ANSWER))
        self._sends = [request for request in self._sends if not request.Test()]

    def missing(self, members: Sequence[int]) -> str:
        """Who of `members` is not where this rank is, in words. Takes up to a second: it waits for answers."""
        others = [rank for rank in members if rank != self._rank]
        self._sends += [self._comm.Isend([b"", MPI.BYTE], rank, _ASK) for rank in others]
        answers: dict[int, str] = {}
        end = time.perf_counter() + _ANSWER_SECONDS
        while len(answers) < len(others) and time.perf_counter() < end:
            self.answer()
            self._collect(answers)
            time.sleep(1e-3)
        absent = [self.describe(rank) for rank in others if rank not in answers]
        elsewhere = [
            f"{self.describe(rank)} waits for {answers[rank] or 'work'}"
            for rank in others
            if answers.get(rank, self.waiting) != self.waiting
        ]
        self._linger(end)
        parts = [f"not arrived and not answering: {', '.join(absent)}"] if absent else []
        parts += [f"not arrived: {', '.join(elsewhere)}"] if elsewhere else []
        return "; ".join(parts) or "all members wait for the same operation: the network lost a message"

    def _collect(self, answers: dict[int, str]) -> None:
        status = MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, _ANSWER, status):
            buffer = bytearray(status.Get_count(MPI.BYTE))
            source = status.Get_source()
            self._comm.Recv([buffer, MPI.BYTE], source, _ANSWER)
            answers[source] = buffer.decode()

    def _linger(self, end: float) -> None:
        # The others' deadlines pass at about the same time; leaving at once would make this rank look lost to them.
        while time.perf_counter() < end:
            self.answer()
            time.sleep(1e-3)

    def meet(self, members: Sequence[int], what: str) -> None:
        """Return when all `members` are here, for the same purpose: before MPI calls that block without a deadline.

        Raises:
            RankLostError: somebody did not come before the deadline, or came for something else.
        """
        leader = members[0]
        mark = zlib.crc32(repr((what, tuple(members))).encode()).to_bytes(4, "little")
        peers = [rank for rank in members if rank != leader] if self._rank == leader else [leader]
        buffers = [bytearray(4) for _ in peers]
        self.waiting = what
        receives = [self._comm.Irecv([buffers[i], MPI.BYTE], rank, _MEET) for i, rank in enumerate(peers)]
        if self._rank != leader:
            self._sends.append(self._comm.Isend([mark, MPI.BYTE], leader, _MEET))
        wait_until(
            lambda: bool(MPI.Request.Testall(receives)),
            self._patience,
            lambda: f"{what}; {self.missing(members)}",
            self.answer,
        )
        if self._rank == leader:
            self._sends += [self._comm.Isend([mark, MPI.BYTE], rank, _MEET) for rank in peers]
        self.waiting = ""
        for rank, buffer in zip(peers, buffers, strict=True):
            if buffer != mark:
                raise RankLostError(
                    f"rank {self._rank} came for {what} of ranks {list(members)}, but {self.describe(rank)} for "
                    "something else: all members open their groups in the same order, with the same names"
                )
