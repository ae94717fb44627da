"""Sums over ranks that travel while the other half of a step's rows is computed.

Between hosts the sums of a long prompt take as long as its products, or longer. So the rows of a step are cut in two
lanes, and a half of a layer is computed for one lane while the sum of the other is on its way. The second lane sees the
keys of the first, which are in the cache by then. What is computed and summed is the same as in one piece.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from lepton_dist.comm.wait import sleep_at_once
from lepton_dist.kernels.cpu.tensors import work_alone
from lepton_dist.model.decoder_layer import DecoderLayer
from lepton_dist.model.layers import Angles, Attend, Linear
from lepton_dist.plan.crossing import OVERLAP_ROWS

_WIDTHS_AN_OCTAVE = 8  # of steps that are compared: unlike ones take unlike times a row
_TRIALS = 2  # of each way; the faster one of its two counts, as the first may meet cold memory
_LEAST_GAIN = 0.98  # of the time in one piece, that lanes must stay below

Agree = Callable[[float], float]
"""The largest of the ranks' values, on every rank: they must all decide alike."""


class Overlap:
    """Runs wide steps in lanes, where that was found to be faster.

    The first few of one width are run both ways, alternately, and timed: on a fast network two narrow products and the
    handing over can cost more than the sums do. The thread that carries sums carries one after the other, in the order
    that is the same on every rank; while it has one, the other does not communicate: MPI takes calls of one thread at a
    time.
    """

    def __init__(self, agree: Agree) -> None:
        # Its own arithmetic is little, and a second team of threads would fight with the one that computes.
        self._carrier = ThreadPoolExecutor(1, "lepton-sums", initializer=_begin)
        self._agree = agree
        # Seconds a row of trials in one piece and in lanes, of steps about as wide.
        self._row_s: dict[int, tuple[list[float], list[float]]] = {}
        self._pays: bool | None = None

    def run(
        self, layers: Sequence[DecoderLayer], hidden: torch.Tensor, angles: Angles | None, attend: Attend
    ) -> torch.Tensor | None:
        """hidden float32 [tokens, hidden], changed in place -> the last layer's delta, as `DecoderLayer` gives it.

        Raises:
            RankLostError: a sum did not come in time.
        """
        rows = hidden.shape[0]
        if rows < OVERLAP_ROWS or self._pays is False:
            return run_in_one_piece(layers, hidden, angles, attend)
        if self._pays:
            return self._in_lanes(layers, hidden, angles, attend)
        whole, cut = self._row_s.setdefault(round(_WIDTHS_AN_OCTAVE * math.log2(rows)), ([], []))
        is_cut, start_s = len(cut) < len(whole), time.perf_counter()
        delta = (self._in_lanes if is_cut else run_in_one_piece)(layers, hidden, angles, attend)
        (cut if is_cut else whole).append((time.perf_counter() - start_s) / rows)
        if len(cut) == _TRIALS:
            self._pays = self._agree(min(cut) / min(whole)) < _LEAST_GAIN
        return delta

    def _in_lanes(
        self, layers: Sequence[DecoderLayer], hidden: torch.Tensor, angles: Angles | None, attend: Attend
    ) -> torch.Tensor:
        middle = hidden.shape[0] // 2
        rows = np.arange(hidden.shape[0])
        lanes = [self._lane(part, hidden, angles, attend) for part in (rows[:middle], rows[middle:])]
        for index, layer in enumerate(layers):
            for lane in lanes:
                part = layer.attention_half(lane.hidden, lane.sum(), lane.angles, index, lane.attend)
                lane.pending = self._carrier.submit(_whole, layer.attention.output, part)
            for lane in lanes:
                mixed = lane.sum()
                assert mixed is not None  # that of this layer's attention
                lane.pending = self._carrier.submit(_whole, layer.mlp.down, layer.mlp_half(lane.hidden, mixed))
        return torch.cat([delta for lane in lanes if (delta := lane.sum()) is not None])

    def close(self) -> None:
        """End the thread; what it carries is carried to its end."""
        self._carrier.shutdown()

    def _lane(self, rows: NDArray[np.int64], hidden: torch.Tensor, angles: Angles | None, attend: Attend) -> _Lane:
        first, last = int(rows[0]), int(rows[-1]) + 1
        turned = None if angles is None else (angles[0][first:last], angles[1][first:last])
        return _Lane(hidden[first:last], turned, attend.of_rows(rows))


def run_in_one_piece(
    layers: Sequence[DecoderLayer], hidden: torch.Tensor, angles: Angles | None, attend: Attend
) -> torch.Tensor | None:
    """As `Overlap.run`, each sum waited for."""
    delta = None
    for index, layer in enumerate(layers):
        delta = layer(hidden, delta, angles, index, attend)
    return delta


class _Lane:
    """Some of a step's rows, and the sum of theirs that is on its way."""

    def __init__(self, hidden: torch.Tensor, angles: Angles | None, attend: Attend) -> None:
        self.hidden, self.angles, self.attend = hidden, angles, attend
        self.pending: Future[torch.Tensor] | None = None

    def sum(self) -> torch.Tensor | None:
        """Wait for it; None where there was none yet."""
        return None if self.pending is None else self.pending.result()


def _begin() -> None:
    work_alone()
    sleep_at_once()


@torch.inference_mode()
def _whole(linear: Linear, part: torch.Tensor) -> torch.Tensor:
    return linear.whole(part)
