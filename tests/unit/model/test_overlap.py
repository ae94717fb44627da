"""A step in two lanes, whose sums travel meanwhile, gives what the step in one piece gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lepton_dist.engine.batch import RunBatch
from lepton_dist.errors import RankLostError
from lepton_dist.kernels.cpu.native import native_library
from lepton_dist.model.config import RopeConfig
from lepton_dist.model.decoder import Decoder
from lepton_dist.model.decoder_layer import DecoderLayer, make_layer
from lepton_dist.model.layers import Linear
from lepton_dist.model.overlap import Overlap
from lepton_dist.model.rope import RopeTables
from lepton_dist.plan.crossing import OVERLAP_ROWS
from tests.unit.model.layer import HEAD_DIM, layer
from tests.unit.model.test_last_layer import batch_of, run_rows

BATCHES = {
    "a prompt": [(0, 150, True, False)],
    "a later part of one": [(30, 129, False, False)],
    "many": [(3, 1, True, False), (0, 90, True, False), (17, 40, False, False), (60, 1, True, False)],
}
Sum = Callable[[torch.Tensor], torch.Tensor]


def decoder(num_layers: int, kind: str, sums: Sum, overlap: Overlap | None, *, bias: bool = False) -> Decoder:
    def summed(linear: Linear) -> Linear:
        return replace(linear, reduce=sums)

    def one() -> DecoderLayer:
        made = layer(kind, torch.float32, bias=bias)
        attention = replace(made.attention, output=summed(made.attention.output))
        mlp = replace(made.mlp, down=summed(made.mlp.down))
        return make_layer(made.attention_norm, attention, made.mlp_norm, mlp, 32)

    rope = RopeTables(RopeConfig(theta=10000.0, dim=HEAD_DIM), 256)
    return Decoder(None, [one() for _ in range(num_layers)], None, rope, overlap)


def chosen(pays: bool) -> Overlap:
    """One whose trials are over."""
    overlap = Overlap(lambda mine: mine)
    overlap._pays = pays
    return overlap


@torch.inference_mode()
def run(made: Decoder, batch: RunBatch) -> list[torch.Tensor]:
    """The residual stream and the cache."""
    hidden, arenas = run_rows(made, batch)
    return [hidden, *arenas]


@pytest.mark.parametrize("parts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("kind", "bias"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_two_lanes_give_what_one_gives(kind: str, bias: bool, parts: list[tuple[int, int, bool, bool]]) -> None:
    if kind != "float32" and native_library() is None:
        pytest.skip("the compiled kernels were not built")
    carriers = set()

    def double(x: torch.Tensor) -> torch.Tensor:
        carriers.add(threading.current_thread().name)
        time.sleep(0.002)  # so that what is computed meanwhile could spoil it
        return x.mul_(2)

    overlap, batch = chosen(True), batch_of(parts)
    together = run(decoder(3, kind, double, None, bias=bias), batch)
    assert carriers == {threading.current_thread().name}
    carriers.clear()
    in_lanes = run(decoder(3, kind, double, overlap, bias=bias), batch)
    overlap.close()
    assert len(carriers) == 1 and carriers != {threading.current_thread().name}
    # float32 activations; with another number of rows attention, torch's product and the ends of what threads share add
    # up in another order.
    for mine, wanted in zip(in_lanes, together, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)


def test_one_lane_is_computed_while_the_sum_of_the_other_travels() -> None:
    begun, seen = threading.Semaphore(0), []

    def waiting(x: torch.Tensor) -> torch.Tensor:
        begun.acquire(timeout=10)  # the first lane's own half of the layer
        seen.append(begun.acquire(timeout=10) if not seen else True)  # and, during its sum, the other lane's
        return x

    def watched(x: torch.Tensor) -> torch.Tensor:
        begun.release()
        return x

    overlap = chosen(True)
    made = decoder(1, "float32", lambda x: x, overlap)
    made.layers[0].attention.qkv.reduce = watched
    made.layers[0].attention.output.reduce = waiting
    run(made, batch_of([(0, OVERLAP_ROWS, True, False)]))
    overlap.close()
    assert seen[0], "the second lane waited for the first one's sum"


def test_a_sum_that_fails_is_raised_where_it_is_waited_for() -> None:
    def lost(x: torch.Tensor) -> torch.Tensor:
        raise RankLostError("rank 1 is gone")

    overlap = chosen(True)
    with pytest.raises(RankLostError, match="rank 1 is gone"):
        run(decoder(2, "float32", lost, overlap), batch_of([(0, 200, True, False)]))
    overlap.close()


@pytest.mark.parametrize(("quotient", "pays"), [(0.9, True), (1.0, False)])
def test_both_ways_are_tried_and_all_ranks_choose_one(quotient: float, pays: bool) -> None:
    told, ways = [], []

    def agree(mine: float) -> float:
        told.append(mine)
        return quotient

    def sums(x: torch.Tensor) -> torch.Tensor:
        ways.append(threading.current_thread() is threading.main_thread())
        return x

    overlap = Overlap(agree)
    made = decoder(1, "float32", sums, overlap)
    # Steps of 128 to 130 rows are compared with one another, those of 150 and 200 are trials of their own.
    steps = [(128, True), (127, True), (150, True), (130, False), (200, True), (128, True), (150, False), (129, False)]
    assert OVERLAP_ROWS == 128
    for rows, expected in [*steps, (160, not pays), (129, not pays), (127, True)]:
        ways.clear()
        run(made, batch_of([(0, rows, True, False)]))
        is_whole = all(ways)
        assert is_whole or not any(ways)
        # Narrow steps are in one piece whatever was chosen.
        assert is_whole == expected, rows
    overlap.close()
    assert len(told) == 1 and told[0] > 0
