"""How long a controller takes for requests: what the measuring jobs share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lepton_dist.engine.request import Request
from lepton_dist.runtime.controller import Controller


def seconds_for(
    controller: Controller, requests: Sequence[Request], meanwhile: Callable[[float], None] | None = None
) -> float:
    """From the first request to the last; `meanwhile` is told again and again how long it has been."""
    start = time.perf_counter()
    for request in requests:
        controller.submit(request)
    while controller.num_outstanding:
        controller.advance()
        if meanwhile is not None:
            meanwhile(time.perf_counter() - start)
    return time.perf_counter() - start
