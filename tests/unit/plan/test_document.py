"""Plans as YAML: what is written is read back equal, and each mistake is named with file, line, key and numbers."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lepton_dist.errors import ConfigError
from lepton_dist.plan.axes import ModelShape
from lepton_dist.plan.document import load_plan, parse_bytes, parse_plan, plan_to_yaml
from lepton_dist.plan.placement import seats
from lepton_dist.plan.plan import EngineLimits, Mesh, Plan, Precision, Replica, Stage

SHAPE = ModelShape(num_layers=32, hidden=64, num_heads=8, num_kv_heads=2, head_dim=8, ffn=100, vocab=331)

precisions = st.builds(Precision, *[st.sampled_from([None, "float32", "bfloat16", "float16"])] * 3)
limits = st.builds(
    EngineLimits,
    block_tokens=st.integers(1, 64),
    max_batch_tokens=st.one_of(st.just("auto"), st.integers(1, 4096)),
    max_sequences=st.integers(1, 512),
    kv_cache_bytes=st.one_of(st.just("auto"), st.integers(1, 2**40)),
    context_tokens=st.one_of(st.just("auto"), st.integers(1, 10**6)),
    prefix_cache=st.booleans(),
    step_timeout_s=st.floats(0.5, 1e4),
    load_timeout_s=st.floats(0.5, 1e4),
)
share = st.floats(0.001, 1000, allow_nan=False)


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    ranks = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4))
    shares = draw(st.one_of(st.just([1.0] * len(ranks)), st.lists(share, min_size=len(ranks), max_size=len(ranks))))
    if len(set(shares)) == 1:
        shares = [1.0] * len(ranks)  # equal shares are the default, and written as it
    return Stage(tuple(ranks), draw(st.integers(0, 40)), tuple(shares))


replicas = st.lists(
    st.builds(Replica, st.lists(stages(), min_size=1, max_size=3).map(tuple)), min_size=1, max_size=3
).map(tuple)
meshes = st.builds(Mesh, *[st.integers(1, 64)] * 3)
plans = st.one_of(
    st.builds(Plan, mesh=meshes, precision=precisions, engine=limits),
    st.builds(Plan, replicas=replicas, precision=precisions, engine=limits),
    st.builds(Plan, is_auto=st.just(True), precision=precisions, engine=limits, cluster=st.sampled_from([None, "c"])),
)


@given(plans)
def test_round_trip(plan: Plan) -> None:
    assert parse_plan(plan_to_yaml(plan)) == plan


def test_a_cluster_is_found_beside_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("{mesh: auto, cluster: here.yaml}")
    plan = load_plan(path)
    assert plan.is_auto and plan.cluster == str(tmp_path / "here.yaml")
    # Rank 0 sends it on, and what is read again is the same.
    assert parse_plan(plan_to_yaml(plan)) == plan


def test_an_automatic_plan_cannot_be_obeyed() -> None:
    with pytest.raises(ConfigError, match="mesh: `auto` is for `generate`"):
        parse_plan("mesh: auto").resolve(SHAPE, 2)


def test_a_resolved_plan_survives_the_round_trip() -> None:
    """Rank 0 sends its resolved plan as YAML; the ranks must resolve it to the same seats."""
    written = "replicas: [{stages: [{ranks: [3, 1], shares: [2, 1]}, {ranks: [0]}]}, {stages: [{ranks: [2]}]}]"
    plan = parse_plan(written).resolve(SHAPE, 4)
    again = parse_plan(plan_to_yaml(plan)).resolve(SHAPE, 4)
    assert again == plan
    assert seats(again, SHAPE) == seats(plan, SHAPE)


def test_the_short_form_expands_with_tensor_parallelism_innermost() -> None:
    plan = parse_plan("mesh: {dp: 2, pp: 3, tp: 2}").resolve(SHAPE, 12)
    assert [[stage.ranks for stage in replica.stages] for replica in plan.replicas] == [
        [(0, 1), (2, 3), (4, 5)],
        [(6, 7), (8, 9), (10, 11)],
    ]
    assert [stage.layer_range for stage in plan.replicas[1].stages] == [range(11), range(11, 22), range(22, 32)]


def test_the_default_is_tensor_parallel_inside_nodes_and_pipelines_between_them() -> None:
    plan = Plan.default([0, 0, 1, 1, 1]).resolve(SHAPE, 5)
    assert [stage.ranks for stage in plan.replicas[0].stages] == [(0, 1), (2, 3, 4)]


EXPLICIT = """\
# a comment
replicas:
  - stages:
      - {ranks: [0, 1], layers: 20, shares: [2, 1]}
      - {ranks: [2], layers: %s}
precision: {weights: bfloat16}
"""

# (text, line of the error, key, what the message must hold)
MISTAKES: dict[str, tuple[str, int, str, list[str]]] = {
    "not YAML": ("mesh: {dp: 1\nengine: {}", 2, "", ["not valid YAML"]),
    "not a mapping": ("- mesh", 1, "", ["mapping", "list"]),
    "both forms": ("mesh: {tp: 1}\nreplicas: [{stages: [{ranks: [0]}]}]", 2, "replicas", ["not both"]),
    "cluster": ("mesh: {tp: 2}\ncluster: 7", 2, "cluster", ["path of a cluster file", "7"]),
    "unknown key": ("mesh: {tp: 1}\nmash: {}", 2, "mash", ["mesh", "replicas", "engine"]),
    "unknown mesh key": ("mesh:\n  tp: 1\n  ep: 2", 3, "mesh.ep", ["dp, pp, tp"]),
    "mesh of zero": ("mesh:\n  tp: 0", 2, "mesh.tp", ["at least 1", "0"]),
    "mesh of true": ("mesh: {tp: true}", 1, "mesh.tp", ["True"]),
    "mesh as a list": ("mesh: [1, 2]", 1, "mesh", ["mapping", "list"]),
    "a key twice": ("mesh: {tp: 1}\nmesh: {tp: 2}", 2, "mesh", ["twice"]),
    "no replicas": ("replicas: []", 1, "replicas", ["at least one"]),
    "no stages": ("replicas:\n  - stages: []", 2, "replicas[0].stages", ["at least one stage"]),
    "no ranks": ("replicas:\n  - stages:\n      - layers: 3", 3, "replicas[0].stages[0].ranks", ["at least one rank"]),
    "negative rank": ("replicas: [{stages: [{ranks: [-1]}]}]", 1, "replicas[0].stages[0].ranks[0]", ["-1"]),
    "shares of another number": (
        "replicas:\n  - stages:\n      - ranks: [0, 1]\n        shares: [1, 2, 3]",
        4,
        "replicas[0].stages[0].shares",
        ["3 shares for 2 ranks"],
    ),
    "share of nothing": (
        "replicas: [{stages: [{ranks: [0, 1], shares: [1, 0]}]}]",
        1,
        "replicas[0].stages[0].shares[1]",
        ["above 0", "0"],
    ),
    "infinite share": (
        "replicas: [{stages: [{ranks: [0, 1], shares: [1, .inf]}]}]",
        1,
        "replicas[0].stages[0].shares[1]",
        ["inf"],
    ),
    "unknown stage key": (
        "replicas: [{stages: [{ranks: [0], layer: 3}]}]",
        1,
        "replicas[0].stages[0].layer",
        ["ranks, layers, shares"],
    ),
    "unknown dtype": ("mesh: {}\nprecision:\n  weights: int3", 3, "precision.weights", ["int3", "bfloat16"]),
    "unknown engine key": ("mesh: {}\nengine: {block: 3}", 2, "engine.block", ["block_tokens"]),
    "engine out of range": ("mesh: {}\nengine:\n  block_tokens: 0", 3, "engine.block_tokens", ["at least 1", "0"]),
    "engine of text": ("mesh: {}\nengine: {max_sequences: many}", 2, "engine.max_sequences", ["'many'"]),
    "prefix cache": ("mesh: {}\nengine: {prefix_cache: 1}", 2, "engine.prefix_cache", ["true or false", "1"]),
    "a timeout of nothing": ("mesh: {}\nengine: {step_timeout_s: 0}", 2, "engine.step_timeout_s", ["seconds", "0"]),
    "a size that is none": ("mesh: {}\nengine: {kv_cache_bytes: 4 XB}", 2, "engine.kv_cache_bytes", ["4 XB", "GiB"]),
    "a size of nothing": ("mesh: {}\nengine: {kv_cache_bytes: 0}", 2, "engine.kv_cache_bytes", ["at least 1 byte"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str, tmp_path: Path) -> None:
    text, line, key, words = MISTAKES[name]
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: {key}".rstrip(": ")), message
    assert (caught.value.key, caught.value.exit_code) == (key, 2)
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read: No such file"):
        load_plan(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"mesh: \xe9")
    with pytest.raises(ConfigError, match=r"not UTF-8 text .* at byte 6"):
        load_plan(tmp_path / "latin.yaml")


# (plan, world size, key, what the message must hold)
MISFITS: dict[str, tuple[str, int, str, list[str]]] = {
    "mesh for another world": ("mesh: {dp: 2, tp: 3}", 4, "mesh", ["dp 2 x pp 1 x tp 3 = 6", "the job has 4"]),
    "a rank outside": (
        "replicas: [{stages: [{ranks: [0, 4]}]}]",
        4,
        "replicas[0].stages[0].ranks",
        ["rank 4", "4 ranks"],
    ),
    "a rank twice": (
        "replicas: [{stages: [{ranks: [0]}]}, {stages: [{ranks: [1, 0]}]}]",
        2,
        "replicas[1].stages[0].ranks",
        ["rank 0", "replicas[0].stages[0].ranks"],
    ),
    "layers that do not add up": (EXPLICIT % 11, 3, "replicas[0].stages", ["31 layers", "32"]),
    "layers for some": (
        "replicas: [{stages: [{ranks: [0], layers: 3}, {ranks: [1]}]}]",
        2,
        "replicas[0].stages[1]",
        ["every stage", "none"],
    ),
    "more stages than layers": ("mesh: {pp: 33}", 33, "replicas[0].stages", ["33 stages", "32 layers"]),
    "more ranks than heads": ("mesh: {tp: 9}", 9, "replicas[0].stages[0].ranks", ["9 ranks", "8 heads"]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_plans_that_do_not_fit_are_named(name: str) -> None:
    text, world_size, key, words = MISFITS[name]
    with pytest.raises(ConfigError) as caught:
        parse_plan(text).resolve(SHAPE, world_size)
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


def test_an_explicit_plan_may_leave_ranks_out() -> None:
    plan = parse_plan(EXPLICIT % 12).resolve(SHAPE, 8)
    assert plan.ranks == {0, 1, 2}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (12, 12),
        ("12", 12),
        ("4GiB", 4 << 30),
        ("500 MB", 500_000_000),
        ("1.5KiB", 1536),
        ("7B", 7),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-4", "4 gigs", "1e9", True, None, 1.5e300])
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)


def test_steps_of_pipelines_on_cpus_are_smaller() -> None:
    limits = EngineLimits()
    assert [limits.batch_tokens(stages) for stages in (1, 2, 4, 8)] == [512, 128, 64, 64]
    asked = EngineLimits(max_batch_tokens=300)
    assert [asked.batch_tokens(stages) for stages in (1, 2, 8)] == [300, 300, 300]
    on_gpus = parse_plan("mesh: {pp: 2}\ndevice: cuda").resolve(SHAPE, 2)
    assert on_gpus.engine.batch_tokens(2) == 512
    assert parse_plan("mesh: {pp: 2}").resolve(SHAPE, 2).engine.batch_tokens(2) == 128
