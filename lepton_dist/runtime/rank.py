"""One rank's part in the job: takes messages, runs steps, and leads its replica where it is the leader."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from lepton_dist.comm.mailbox import Mailbox
from lepton_dist.comm.world import World
from lepton_dist.engine.batch import RunBatch
from lepton_dist.engine.engine import Engine
from lepton_dist.engine.request import Scanner
from lepton_dist.engine.runner import BegunStep, StepResult
from lepton_dist.errors import ConfigError
from lepton_dist.plan.document import parse_plan
from lepton_dist.runtime.examine import examine
from lepton_dist.runtime.leader import Leader
from lepton_dist.runtime.messages import (
    Abandon,
    Assign,
    CloseSession,
    Codec,
    Drain,
    Examine,
    Examined,
    Message,
    OpenSession,
    SessionClosed,
    SessionRefused,
    Shutdown,
    TakeBack,
)
from lepton_dist.runtime.session import Session, open_session
from lepton_dist.runtime.watchdog import Watchdog
from lepton_dist.text.detokenizer import StopScanner
from lepton_dist.text.tokenizer import Tokenizer

# Seconds: what leaving a session may take beyond a step, and how long after the waits' deadlines the watchdog bites.
CLOSE_TIMEOUT_S = 30.0
WATCHDOG_MARGIN_S = 60.0
# What a rank takes in before it turns to its own step: many messages must not keep it from that, nor from signals.
_TURN_MESSAGES, _TURN_S = 256, 0.005


class Rank:
    """Handles every message but those that only rank 0 gets, which go to `to_controller`."""

    def __init__(
        self, world: World, to_controller: Callable[[Message], None], watchdog: Watchdog | None = None
    ) -> None:
        self.world = world
        self._watchdog = watchdog
        self.exit_code: int | None = None
        self._to_controller = to_controller
        self._codec = Codec()
        self._mailbox: Mailbox = world.mailbox("commands")
        self._session: Session | None = None
        self._leader: Leader | None = None
        self._steps: deque[RunBatch] = deque()
        self._behind: BegunStep | None = None

    def send(self, to: int, message: Message) -> None:
        """Send a message to any rank, this one included."""
        self._mailbox.send(to, self._codec.encode(message))

    def flush(self) -> None:
        """Return when every message sent so far has left."""
        self._mailbox.flush()

    def advance(self) -> bool:
        """Do what there is to do now; False when there was nothing.

        Raises:
            RankLostError: another rank did not answer in time.
        """
        is_busy = False
        if self._watchdog is not None:
            self._watchdog.feed()
        end_s = time.monotonic() + _TURN_S
        for _ in range(_TURN_MESSAGES):
            received = self._mailbox.poll()
            if received is None:
                break
            is_busy = True
            self._handle(self._codec.decode(received[1]))
            if time.monotonic() > end_s:
                break
        if self._steps:
            self._follow(self._steps.popleft())
            is_busy = True
        if self._session is not None:
            is_busy |= self._session.runner.progress()
        if self._leader is not None:
            is_busy |= self._leader.advance()
            if self._leader.is_closed:
                self._leader.release()
                self._close_session()
        return is_busy

    def _handle(self, message: Message) -> None:
        if isinstance(message, RunBatch):
            self._require_session().runner.expect(message)
            self._steps.append(message)
        elif isinstance(message, StepResult):
            self._require_leader().take(message)
        elif isinstance(message, Assign):
            self._require_leader().assign(message.requests)
        elif isinstance(message, TakeBack):
            self._require_leader().take_back(message.keys)
        elif isinstance(message, Drain):
            self._require_leader().drain()
        elif isinstance(message, Abandon):
            self._require_leader().abandon()
        elif isinstance(message, OpenSession):
            self._open_session(message)
        elif isinstance(message, CloseSession):
            if self._leader is not None:
                self._leader.close()
            else:
                self._close_session()
        elif isinstance(message, Examine):
            self.send(0, Examined(examine(self.world, message.model, kinds=message.kinds, threads=message.threads)))
        elif isinstance(message, Shutdown):
            self.exit_code = message.code
        else:
            self._to_controller(message)

    def _follow(self, batch: RunBatch) -> None:
        """Run a step that the leader ordered; the first rank of the last stage answers for all.

        Its other ranks wait a step later, so that their GPUs have the next one by then.
        """
        session = self._require_session()
        begun = session.runner.begin(batch)
        if begun is not None and session.seat.shard == 0 and not session.seat.is_first:
            self.send(session.replica.leader, begun.result())
        else:
            self._wait_behind()
            self._behind = begun

    def _wait_behind(self) -> None:
        if self._behind is not None:
            self._behind.result()
            self._behind = None

    def _open_session(self, order: OpenSession) -> None:
        plan = parse_plan(order.plan)
        limits = plan.engine
        self._watch("loading", limits.load_timeout_s)
        try:
            session, ready = open_session(self.world, order, plan)
        except ConfigError as error:
            self.send(0, SessionRefused(self.world.rank, error.message, error.key))
            return
        self._session = session
        self._watch("stepping", limits.step_timeout_s)
        if session is not None and session.replica.leader == self.world.rank:
            self._leader = self._make_leader(session, order.model)
        self.send(0, ready)

    def _watch(self, phase: str, timeout_s: float) -> None:
        """From here on, waits belong to `phase`."""
        self.world.patience.phase, self.world.patience.seconds = phase, timeout_s
        if self._watchdog is not None:
            self._watchdog.feed(timeout_s=timeout_s + WATCHDOG_MARGIN_S, phase=phase)

    def _make_leader(self, session: Session, model: str) -> Leader:
        blueprint, replica, world = session.blueprint, session.replica, self.world
        tokenizers: list[Tokenizer] = []

        def make_scanner(stops: tuple[str, ...], preceding: list[int]) -> Scanner:
            if not tokenizers:
                tokenizers.append(Tokenizer.load(model))
            return StopScanner(tokenizers[0], stops, preceding)

        def describe_last() -> str:
            ranks = replica.stages[-1].ranks
            return ", ".join(f"rank {rank} on {world.hosts[rank]}" for rank in ranks)

        engine = Engine(
            blueprint.limits,
            session.ready.num_blocks,
            len(replica.stages),
            blueprint.config.eos_token_ids,
            make_scanner,
            blueprint.config.long_after,
            ahead=session.ahead,
        )
        followers = tuple(rank for rank in replica.ranks if rank != world.rank)
        timeout_s = blueprint.limits.step_timeout_s
        return Leader(
            session.seat.replica,
            len(blueprint.plan.replicas),
            engine,
            session.runner,
            followers,
            timeout_s,
            self.send,
            describe_last,
        )

    def _close_session(self) -> None:
        self._wait_behind()
        if self._session is not None:
            self._session.close()
        self._session = self._leader = None
        self.send(0, SessionClosed(self.world.rank))

    def _require_session(self) -> Session:
        if self._session is None:
            raise ValueError(f"rank {self.world.rank} was ordered to run a step without an open session")
        return self._session

    def _require_leader(self) -> Leader:
        if self._leader is None:
            raise ValueError(f"rank {self.world.rank} leads no replica")
        return self._leader
