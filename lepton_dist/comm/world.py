"""The world: all ranks of the job, and the door to everything that connects them.

`open_world` gives each process its world; `run_local` gives one to each of several threads, for tests.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from lepton_dist.comm.group import Group
from lepton_dist.comm.launcher import Launcher, read_launcher
from lepton_dist.comm.mailbox import Mailbox
from lepton_dist.comm.patience import Patience
from lepton_dist.comm.transport import Fabric, Links
from lepton_dist.comm.transports.local import Hub, LocalFabric
from lepton_dist.errors import RankLostError

T = TypeVar("T")


class World:
    """This process (or thread) among all the ranks of the job.

    `hosts` and `nodes` hold the host name and the node index of each rank; ranks that can share memory have the same
    node. `local_rank` counts the ranks of this node. Waits end when `patience` is over.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        nodes: Sequence[int],
        fabric: Fabric,
        patience: Patience,
        library: str = "",
    ) -> None:
        self.rank = rank
        self.size = len(hosts)
        self.hosts = tuple(hosts)
        self.nodes = tuple(nodes)
        self.local_rank = self.nodes[:rank].count(self.nodes[rank])
        self.patience = patience
        self.library = library  # the MPI library's name and version; empty without MPI
        self._fabric = fabric

    @property
    def serves_any_thread(self) -> bool:
        """Whether groups may be used by one thread and then by another, if never by two at a time."""
        return self._fabric.serves_any_thread

    def group(self, members: Sequence[int], name: str) -> Group:
        """The group of these world ranks, in this order; collective over the members and nobody else.

        Ranks that open several groups together open them in the same order. A group of one makes no MPI call.

        Raises:
            ValueError: no members, a rank twice, a rank outside the world, or this rank is not among them.
            RankLostError: a member did not come before the deadline.
        """
        ranks = tuple(members)
        problem = self._problem(ranks)
        if problem:
            raise ValueError(f"group {name!r} of ranks {list(ranks)}: {problem}")
        links = self._fabric.connect(ranks, name) if len(ranks) > 1 else Links()
        return Group(name, ranks, ranks.index(self.rank), links, len({self.nodes[rank] for rank in ranks}))

    def mailbox(self, name: str) -> Mailbox:
        """A mailbox between all ranks; collective over the whole world."""
        return Mailbox(name, self.size, self._fabric.post(name), self.patience)

    def abort(self, code: int) -> NoReturn:
        """Flush the standard streams and end every process of the job with `code`."""
        self._fabric.abort(code)

    def close(self, code: int = 0) -> None:
        """Leave in good order; collective over the world.

        When the others do not come in time, the job is aborted with `code`, or 70 where that is 0.
        """
        self._fabric.close(code)

    def _problem(self, ranks: tuple[int, ...]) -> str:
        outside = [rank for rank in ranks if not 0 <= rank < self.size]
        if outside:
            return f"rank {outside[0]} is not in this world, which has {self.size} ranks, 0 to {self.size - 1}"
        if len(set(ranks)) != len(ranks):
            return "a rank is named twice"
        if self.rank not in ranks:
            return f"this is rank {self.rank}, and only members may open a group"
        return ""


def open_world(patience: Patience | None = None, launcher: Launcher | None = None) -> World:
    """The world of this process.

    Without a launcher, or with one that started a single process, it is a world of one and MPI is never loaded.

    Raises:
        LaunchError: MPI cannot be loaded, or the launcher belongs to another MPI than the library. It is raised on
            every rank; print it where `read_launcher().rank` is 0.
    """
    patience = patience or Patience()
    launcher = launcher or read_launcher()
    if launcher.size == 1:
        return World(0, (socket.gethostname(),), (0,), LocalFabric(Hub(), 0, patience), patience)
    # MPI's library starts threads and takes time to load: only a job of several ranks pays for it.
    from lepton_dist.comm.transports.mpi_fabric import start_mpi

    fabric = start_mpi(launcher, patience)
    return World(fabric.rank, fabric.hosts, fabric.nodes, fabric, patience, fabric.library)


def local_worlds(size: int, patience: Patience | None = None) -> list[World]:
    """Worlds for `size` threads of this process, one each. Each thread must use its own.

    They share one `patience` when one is given.
    """
    return _worlds_at(Hub(), size, patience)


def run_local(size: int, fn: Callable[[World], T], seconds: float = 60.0) -> list[T]:
    """Run `fn(world)` in `size` threads and return their results in rank order.

    The first error of any thread is raised again; the others are released from their waits.

    Raises:
        RankLostError: a thread has not ended after `seconds`.
    """
    hub = Hub()
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def body(world: World) -> None:
        try:
            results[world.rank] = fn(world)
        except BaseException as error:  # handed to the caller below, whatever it is
            errors.append(error)
            hub.stop()

    worlds = _worlds_at(hub, size, None)
    threads = [threading.Thread(target=body, args=(world,), daemon=True) for world in worlds]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0.0))
    late = [str(world.rank) for world, thread in zip(worlds, threads, strict=True) if thread.is_alive()]
    if late and not errors:
        hub.stop()
        raise RankLostError(f"local ranks {', '.join(late)} of {size} did not end within {seconds:g} s")
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def _worlds_at(hub: Hub, size: int, patience: Patience | None) -> list[World]:
    hosts, nodes = (socket.gethostname(),) * size, (0,) * size
    worlds = []
    for rank in range(size):
        own = patience or Patience()
        worlds.append(World(rank, hosts, nodes, LocalFabric(hub, rank, own), own))
    return worlds
