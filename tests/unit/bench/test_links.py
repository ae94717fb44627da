"""What `inspect --link` says of a plan: which traffic crosses nodes, how much it is, and when it warns."""

from __future__ import annotations

from pathlib import Path

import pytest

from lepton_dist.bench.links import LinkReport, NetworkLink
from lepton_dist.errors import UsageError
from lepton_dist.plan.crossing import wide_stages
from lepton_dist.plan.document import parse_plan
from lepton_dist.plan.precision import decide_dtypes
from lepton_dist.runtime.blueprint import Blueprint

TINY = Path(__file__).parents[3] / "configs" / "examples" / "tiny-stdlib"  # 6 layers, hidden 256, bfloat16
LINK = NetworkLink(100e-6, 125e6)


def report(text: str, ranks: int, ranks_per_node: int = 1) -> list[str]:
    plan = parse_plan(text)
    blueprint = Blueprint.draw(str(TINY), plan, ranks)
    dtypes = decide_dtypes(plan.precision, None, blueprint.config.dtype)
    return LinkReport(blueprint, dtypes, LINK, ranks_per_node).lines()


def test_tensor_parallelism_over_nodes_is_priced_and_warned_of() -> None:
    lines = report("mesh: {tp: 2}", 2)
    # 13 sums of 256 channels: one round of 512 bytes at 100 us + 4.1 us; two of 128 KiB at 100 us + 1049 us.
    assert lines[1] == "  replica 0, stage 0: tp 2 over 2 nodes sends 13 sums a step over the network"
    assert lines[2] == "    decode, 1 token: 13 x 0.5 KiB, 1.35 ms"
    assert lines[3] == "    prefill, 512 tokens: 13 x 256.0 KiB, 29.9 ms"
    assert "warning" in lines[4] and "(pp 2 x tp 1) would send 1 message(s) a step, 0.104 ms and 2.2 ms" in lines[4]
    assert len(lines) == 6 and "GB/s (decode)" in lines[5]


def test_an_int8_wire_halves_what_is_packed() -> None:
    lines = report("{mesh: {tp: 2}, precision: {wire: int8}}", 2)
    assert lines[2] == "    decode, 1 token: 13 x 0.5 KiB, 1.35 ms"
    assert lines[3].startswith("    prefill, 512 tokens: 13 x 132.0 KiB")


def test_stages_on_nodes_send_a_message_a_rank_and_nothing_is_wrong() -> None:
    lines = report("mesh: {pp: 2, tp: 2}", 4, ranks_per_node=2)
    assert lines[1:] == [
        "  replica 0, stage 0 to 1: 2 message(s) a step",
        "    decode, 1 token: 2 x 0.5 KiB, 0.108 ms",
        "    prefill, 512 tokens: 2 x 256.0 KiB, 4.29 ms",
    ]


@pytest.mark.parametrize(("plan", "per_node"), [("mesh: {tp: 4}", 4), ("mesh: {dp: 2, tp: 2}", 2)])
def test_a_plan_that_stays_inside_nodes_sends_nothing(plan: str, per_node: int) -> None:
    assert report(plan, 4, per_node) == [
        f"between nodes (100 us, 1000 Mbit/s, {per_node} rank(s) a node): only commands and results"
    ]


def test_wide_stages_of_a_mixed_plan() -> None:
    text = "replicas: [{stages: [{ranks: [0, 1]}, {ranks: [2, 3]}]}, {stages: [{ranks: [4, 5]}]}]"
    plan = parse_plan(text).resolve(Blueprint.draw(str(TINY), parse_plan("mesh: {tp: 1}"), 1).config.shape, 6)
    wide = wide_stages(plan, [0, 0, 1, 2, 3, 4])
    assert [(stage.replica, stage.stage_number, stage.num_nodes, stage.num_sums) for stage in wide] == [
        (0, 1, 2, 6),
        (1, 0, 2, 13),
    ]


@pytest.mark.parametrize("text", ["100", "a,b", "1,2,3", "-1,1000", "100,0", "nan,1", "100,inf"])
def test_wrong_links_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--link"):
        NetworkLink.parse(text)


def test_a_link_is_microseconds_and_megabits() -> None:
    link = NetworkLink.parse("100,1000")
    assert link.message_s(125e3) == pytest.approx(1.1e-3)
