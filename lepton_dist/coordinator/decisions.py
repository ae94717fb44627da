"""A log of all that a balancer was told and decided, as JSON lines, from which its decisions can be replayed. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

from lepton_dist.coordinator.balancer import Balancer
from lepton_dist.coordinator.prices import Demand, Prices, Steps
from lepton_dist.plan.plan import BalancerPolicy

Write = Callable[[str], object]
FIRST_BYTES = b'["begin"'
"""What every log begins with."""


class LoggedBalancer(Balancer):
    """A balancer that writes a line for everything it is told and for every decision that is not empty.

    A line is a JSON list: the method's name, its arguments, and for decisions what was decided.
    """

    def __init__(
        self,
        write: Write,
        slots: Sequence[int],
        *,
        policy: BalancerPolicy = "predicted",
        speeds: Sequence[float] | None = None,
        capacities: Sequence[int] | None = None,
        prices: Prices | None = None,
        patience: int = 4096,
    ) -> None:
        super().__init__(slots, policy=policy, speeds=speeds, capacities=capacities, prices=prices, patience=patience)
        self._write = write
        known, sizes = (None if values is None else list(values) for values in (speeds, capacities))
        self._log("begin", list(slots), policy, known, astuple(self.prices), patience, sizes)

    def add(self, key: str, demand: Demand) -> None:
        """A request has come in."""
        self._log("add", key, astuple(demand))
        super().add(key, demand)

    def expect_more(self, is_so: bool) -> None:
        """Whether more will come."""
        self._log("expect_more", is_so)
        super().expect_more(is_so)

    def guess(self, key: str, demand: Demand) -> None:
        """Another prediction for a request of the backlog."""
        self._log("guess", key, astuple(demand))
        super().guess(key, demand)

    def drop_backlog(self) -> list[str]:
        """What no replica has been sent is given up."""
        self._log("drop_backlog")
        return super().drop_backlog()

    def started(self, key: str) -> None:
        """A replica has begun a request."""
        self._log("started", key)
        super().started(key)

    def finished(self, key: str, output_tokens: int | None = None) -> None:
        """A request is done."""
        self._log("finished", key, output_tokens)
        super().finished(key, output_tokens)

    def measured(self, replica: int, steps: Steps) -> None:
        """A replica has run some steps."""
        self._log("measured", replica, astuple(steps))
        super().measured(replica, steps)

    def set_prices(self, prices: Prices) -> None:
        """Another price list."""
        self._log("set_prices", astuple(prices))
        super().set_prices(prices)

    def returned(self, replica: int, keys: Sequence[str]) -> None:
        """Requests that were asked for came back, or did not."""
        self._log("returned", replica, list(keys))
        super().returned(replica, keys)

    def assign(self) -> list[tuple[str, int]]:
        """Requests and the replicas that get them now."""
        decided = super().assign()
        if decided:
            self._log("assign", decided)
        return decided

    def take_back(self) -> list[tuple[int, list[str]]]:
        """Queued requests to ask back."""
        decided = super().take_back()
        if decided:
            self._log("take_back", decided)
        return decided

    def _log(self, *event: object) -> None:
        self._write(json.dumps(event) + "\n")


def replay(lines: Iterable[str]) -> Balancer:
    """The balancer after a logged run, every decision taken anew.

    Raises:
        ValueError: the log has no beginning, or a decision comes out differently; the message names the line.
    """
    balancer: Balancer | None = None
    for number, line in enumerate(lines, 1):
        name, *values = json.loads(line)
        if name == "begin":
            slots, policy, speeds, prices, patience, capacities = values
            balancer = Balancer(
                slots,
                policy=policy,
                speeds=speeds,
                capacities=capacities,
                prices=Prices(*prices),
                patience=patience,
            )
        elif balancer is None:
            raise ValueError(f"line {number}: {name!r} stands before `begin`: the log's beginning is missing")
        elif name in ("assign", "take_back"):
            decided = json.loads(json.dumps(getattr(balancer, name)()))
            if decided != values[0]:
                raise ValueError(f"line {number}: {name} gives {decided} now, but gave {values[0]}")
        else:
            _tell(balancer, name, values)
    if balancer is None:
        raise ValueError("the log is empty")
    return balancer


def _tell(balancer: Balancer, name: str, values: list[Any]) -> None:
    if name in ("add", "guess"):
        getattr(balancer, name)(values[0], Demand(*values[1]))
    elif name == "measured":
        balancer.measured(values[0], Steps(*values[1]))
    elif name == "set_prices":
        balancer.set_prices(Prices(*values[0]))
    else:
        getattr(balancer, name)(*values)
