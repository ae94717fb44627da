"""Rank 0's side of a job: opens sessions, hands requests to replicas with credits, collects what is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from lepton_dist.comm.wait import Backoff
from lepton_dist.comm.world import World
from lepton_dist.coordinator.cluster import Cluster
from lepton_dist.coordinator.cost_model import CostModel
from lepton_dist.coordinator.decisions import Write
from lepton_dist.coordinator.dispatcher import Dispatcher
from lepton_dist.coordinator.prior import measured_prior, typical_prior
from lepton_dist.coordinator.report import RunRecord
from lepton_dist.coordinator.reports import StepReport
from lepton_dist.engine.request import Request
from lepton_dist.errors import ConfigError, LeptonError, RankLostError, RequestError
from lepton_dist.plan.precision import Dtypes
from lepton_dist.runtime.blueprint import Blueprint
from lepton_dist.runtime.broken_weights import broken_model
from lepton_dist.runtime.examine import EXAMINE_TIMEOUT_S
from lepton_dist.runtime.facts import RankFacts
from lepton_dist.runtime.messages import (
    Abandon,
    Abandoned,
    Assign,
    CloseSession,
    Drain,
    Dropped,
    Examine,
    Examined,
    Finished,
    Measured,
    Message,
    OpenSession,
    SessionClosed,
    SessionReady,
    SessionRefused,
    Shutdown,
    TakeBack,
)
from lepton_dist.runtime.rank import CLOSE_TIMEOUT_S, Rank
from lepton_dist.runtime.recorder import Recorder
from lepton_dist.runtime.soundness import Soundness
from lepton_dist.runtime.watchdog import Watchdog
from lepton_dist.telemetry.stopwatch import Stopwatch
from lepton_dist.text.completion import RequestOutput


class Controller:
    """Drives the job from rank 0, which is also a rank like the others.

    Use: `open`, then `submit` while `wants_more`, `advance` in a loop, `close`, `shutdown`.
    """

    def __init__(self, world: World, watchdog: Watchdog | None = None) -> None:
        self.world = world
        self.ready: dict[int, SessionReady] = {}
        self._rank = Rank(world, self._take, watchdog)
        self._backoff = Backoff()
        self._blueprint: Blueprint | None = None
        self._dispatcher = Dispatcher([])
        self._soundness = Soundness(0)
        self._compute, self._capacity = "", 0
        self._recorder: Recorder | None = None
        self._finished: list[tuple[str, RequestOutput]] = []
        self._refused: dict[int, SessionRefused] = {}
        self._closed: set[int] = set()
        self._abandoned: set[int] = set()
        self._is_closing = False
        self._hears: Callable[[int, StepReport], object] | None = None
        self._examined: dict[int, RankFacts] = {}

    def open(
        self,
        blueprint: Blueprint,
        order: OpenSession,
        *,
        is_dynamic: bool = True,
        cluster: Cluster | None = None,
        write: Write | None = None,
    ) -> None:
        """Open a session on every rank and wait until all have loaded.

        Args:
            is_dynamic: without it the replicas get requests in turn, whatever the plan says.
            cluster: the job's machines as they were measured, if they were; the cost model starts from them.
            write: takes the lines of the balancer's log (`coordinator/decisions.py`), if one is wanted.

        Raises:
            ConfigError: weights and KV cache do not fit the memory of a rank; every rank stays as it was.
            CheckpointError: this rank cannot read its shard (another rank's failure ends the job there).
            RankLostError: a rank was not ready in time.
        """
        self.ready.clear()
        self._refused.clear()
        for rank in range(self.world.size):
            own = {"checkpoint": blueprint.checkpoint.packed()} if rank == 0 else {}
            self._rank.send(rank, msgspec.structs.replace(order, **own))
        timeout_s = blueprint.limits.load_timeout_s
        self._wait(lambda: set(range(self.world.size)) - {*self.ready, *self._refused}, timeout_s, "loading")
        if self._refused:
            refused = self._refused[min(self._refused)]
            raise ConfigError(refused.message, key=refused.key)
        self._blueprint = blueprint
        slots = [blueprint.limits.max_sequences] * len(blueprint.plan.replicas)
        policy = blueprint.limits.balancer if is_dynamic else "round_robin"
        capacities = [
            min(self.ready[rank].num_blocks for rank in replica.ranks) * blueprint.limits.block_tokens
            for replica in blueprint.plan.replicas
        ]
        self._capacity = max(capacities)
        self._dispatcher = Dispatcher(slots, policy, capacities=capacities, write=write)
        self._soundness, self._compute = Soundness(blueprint.config.shape.vocab), order.compute
        self._recorder = self._new_recorder(blueprint, order, cluster)

    def record(self) -> RunRecord:
        """What the session has done so far, or the last one did."""
        return self._require_recorder().record()

    def listen(self, hears: Callable[[int, StepReport], object] | None) -> None:
        """Who hears every report of a replica's steps from here on, besides balancer and record; None for nobody."""
        self._hears = hears

    def examine(self, model: str = "", *, kinds: Sequence[str] = (), threads: int = 0) -> list[RankFacts]:
        """What every rank finds out about its machine and its links, in rank order; no session need be open.

        With `kinds` of weights it finds out how fast it computes with them, too, on so many `threads` (0: the job's).

        Raises:
            RankLostError: a rank did not answer in time.
        """
        self._examined.clear()
        for rank in range(self.world.size):
            self._rank.send(rank, Examine(model, list(kinds), threads))
        # Ranks that wait for a lost one give up after the same time, and know better who it is: let them speak first.
        timeout_s = 2 * EXAMINE_TIMEOUT_S
        self._wait(lambda: set(range(self.world.size)) - set(self._examined), timeout_s, "examining the machines")
        return [self._examined[rank] for rank in range(self.world.size)]

    @property
    def is_open(self) -> bool:
        """Whether a session is open."""
        return self._blueprint is not None

    @property
    def wants_more(self) -> bool:
        """Whether the balancer would look at more requests."""
        return self._dispatcher.wants_more

    @property
    def num_outstanding(self) -> int:
        """Requests submitted of which `advance` has not told the end."""
        return self._dispatcher.num_outstanding + self._soundness.num_withheld

    def check(self, request: Request) -> None:
        """Whether a request can run here.

        Raises:
            RequestError: it needs more of the KV cache than there is.
        """
        self._require_open()
        needed = len(request.prompt) + request.sampling.max_tokens
        if needed > self._capacity:
            raise RequestError(
                f"prompt and output need {needed} tokens of KV cache ({len(request.prompt)} + max_tokens "
                f"{request.sampling.max_tokens}), the cache of the largest replica holds {self._capacity}: raise "
                "engine.kv_cache_bytes, or lower max_tokens",
            )

    def submit(self, request: Request) -> None:
        """Queue a request that `check` accepts."""
        self._dispatcher.submit(request)

    def expect_more(self, is_so: bool) -> None:
        """Whether more requests will be submitted; while they are not, the balancer plans for the end."""
        self._dispatcher.expect_more(is_so)

    def advance(self) -> list[tuple[str, RequestOutput]]:
        """Do what there is to do, or doze a little; returns what has finished, or failed, since the last call.

        Raises:
            CheckpointError: the model gives no numbers for any prompt; no request has failed for it.
            RankLostError: a rank did not answer in time.
        """
        self._assign()
        if self._rank.advance():
            self._backoff.busy()
        elif not self._finished:
            self._backoff.idle()
        if self._soundness.is_broken:
            self._soundness = self._soundness.anew()
            raise broken_model(self._require_open(), self._compute)
        finished, self._finished = self._finished, []
        return finished

    def drain(self) -> None:
        """Admit nothing more: drop the backlog, and take back what no replica has begun."""
        self._dispatcher.drain()
        self._soundness = self._soundness.anew()
        for replica in self._require_open().plan.replicas:
            self._rank.send(replica.leader, Drain())

    def abandon(self) -> None:
        """Give up every request that is outstanding; the session stays open for others.

        Raises:
            RankLostError: a rank did not answer in time.
        """
        if self._blueprint is None or not self.num_outstanding:
            return
        self._abandoned.clear()
        leaders = {replica.leader for replica in self._blueprint.plan.replicas}
        for leader in leaders:
            self._rank.send(leader, Abandon())
        timeout_s = self._blueprint.limits.step_timeout_s + CLOSE_TIMEOUT_S
        self._wait(lambda: leaders - self._abandoned, timeout_s, "giving up requests")
        self._dispatcher.abandon()
        self._soundness = self._soundness.anew()
        self._finished.clear()

    def close(self) -> None:
        """Close the session on every rank; what is unfinished is given up."""
        blueprint = self._require_open()
        self._closed.clear()
        self._is_closing = True  # a leader that has closed takes nothing more, and rows still come to their ends
        leaders = {replica.leader for replica in blueprint.plan.replicas}
        for rank in range(self.world.size):
            if rank in leaders or rank not in blueprint.plan.ranks:
                self._rank.send(rank, CloseSession())
        timeout_s = blueprint.limits.step_timeout_s + CLOSE_TIMEOUT_S
        self._wait(lambda: set(range(self.world.size)) - self._closed, timeout_s, "closing the session")
        self._blueprint, self._is_closing = None, False

    def shutdown(self, code: int) -> None:
        """End every other rank with this exit code."""
        for rank in range(1, self.world.size):
            self._rank.send(rank, Shutdown(code))
        self._rank.flush()

    def _assign(self) -> None:
        if self._blueprint is None:
            return
        replicas = self._blueprint.plan.replicas
        given, taken = self._dispatcher.decide()
        for replica, requests in given.items():
            self._rank.send(replicas[replica].leader, Assign(requests))
        for replica, keys in taken:
            self._rank.send(replicas[replica].leader, TakeBack(keys))

    def _take(self, message: Message) -> None:
        """A message that only rank 0 gets."""
        if isinstance(message, Finished):
            self._ended(message.key, message.output)
        elif isinstance(message, Measured):
            self._dispatcher.ran(message.replica, message.begun, message.report)
            self._require_recorder().ran(message.replica, len(message.begun), message.report)
            if self._hears is not None:
                self._hears(message.replica, message.report)
        elif isinstance(message, Dropped):
            keys = [key for key in message.keys if not Soundness.is_probe(key)]
            self._dispatcher.dropped(message.replica, keys)
        elif isinstance(message, Abandoned):
            self._abandoned.add(self._require_open().plan.replicas[message.replica].leader)
        elif isinstance(message, SessionReady):
            self.ready[message.rank] = message
        elif isinstance(message, SessionRefused):
            self._refused[message.rank] = message
        elif isinstance(message, SessionClosed):
            self._closed.add(message.rank)
        elif isinstance(message, Examined):
            self._examined[message.facts.rank] = message.facts
        else:
            raise LeptonError(f"rank 0 got the unexpected message {type(message).__name__}")

    def _ended(self, key: str, output: RequestOutput) -> None:
        """A request, or a probe, has come to its end."""
        if not Soundness.is_probe(key):
            tokens = sum(len(completion.token_ids) for completion in output.completions)
            self._dispatcher.finished(key, None if output.failure else tokens)
        self._finished += self._soundness.ended(key, output)
        if not self._is_closing and (probes := self._soundness.probes()):
            self._rank.send(self._require_open().plan.replicas[0].leader, Assign(probes))

    def _new_recorder(self, blueprint: Blueprint, order: OpenSession, cluster: Cluster | None) -> Recorder:
        world = self.world
        threads = [self.ready[rank].threads for rank in range(world.size)]
        prior = typical_prior(world.hosts, world.nodes, threads) if cluster is None else measured_prior(cluster)
        config, dtypes = blueprint.config, Dtypes(order.weights, order.kv_cache, order.wire, order.compute)
        costs = CostModel(
            prior.cluster, blueprint.plan, config.shape, dtypes, is_gated=config.is_gated, is_tied=config.is_tied
        )
        return Recorder(blueprint.plan, world.hosts, costs, prior)

    def _require_recorder(self) -> Recorder:
        if self._recorder is None:
            raise LeptonError("no session was opened")
        return self._recorder

    def _wait(self, missing: Callable[[], set[int]], timeout_s: float, phase: str) -> None:
        stopwatch = Stopwatch()
        while ranks := missing():
            if self._rank.advance():
                self._backoff.busy()
            else:
                self._backoff.idle()
            if stopwatch.look() > timeout_s:
                names = ", ".join(f"rank {rank} on {self.world.hosts[rank]}" for rank in sorted(ranks))
                raise RankLostError(f"while {phase}: no word within {timeout_s:g} s from {names}")

    def _require_open(self) -> Blueprint:
        if self._blueprint is None:
            raise LeptonError("no session is open")
        return self._blueprint
