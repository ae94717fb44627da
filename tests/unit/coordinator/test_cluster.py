"""Clusters: read as they were written, links by where ranks lie, and hosts that lag behind their twins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.cluster import (
    AllReduce,
    Cluster,
    Link,
    Matmul,
    RankProfile,
    all_reduce_cost_s,
    interpolate,
)
from lepton_dist.coordinator.cluster_document import cluster_to_yaml, parse_cluster, read_cluster, write_cluster
from lepton_dist.errors import ConfigError, OutputError

MATMUL = Matmul({"bfloat16": ((1, 2e10), (32, 1e11), (512, 4e11)), "float32": ((1, 1e10), (512, 2e11))})
PROFILE = RankProfile(
    rank=0,
    host="node0",
    node=0,
    device="cpu",
    threads=4,
    memory_bytes=8 << 30,
    memory_bytes_per_s=2e10,
    matmul=MATMUL,
    attention_bytes_per_s=1e10,
    attention_flops_per_s=5e10,
    step_s=2e-4,
    layer_s=5e-5,
    sequence_s=3e-6,
    kv_head_s=2e-6,
    element_s=1e-9,
    logit_s=2e-10,
)
WITHIN, BETWEEN = Link(1e-6, 1e10), Link(3e-5, 1e9)


def at(rank: int, node: int, speed: float = 1.0) -> RankProfile:
    rates = {dtype: tuple((x, y * speed) for x, y in curve) for dtype, curve in MATMUL.rates.items()}
    return replace(PROFILE, rank=rank, node=node, host=f"node{node}", matmul=Matmul(rates))


def cluster(*nodes: int) -> Cluster:
    return Cluster("test", tuple(at(rank, node) for rank, node in enumerate(nodes)), WITHIN, BETWEEN)


rates = st.floats(1e3, 1e15).map(lambda value: float(f"{value:.3e}"))
curves = st.dictionaries(st.integers(1, 4096), rates, min_size=1, max_size=4).map(lambda c: tuple(sorted(c.items())))
links = st.builds(Link, st.floats(0, 1e-2).map(lambda value: float(f"{value:.3e}")), rates)
kinds = st.builds(
    lambda speed, threads, memory, matmul: replace(
        PROFILE, memory_bytes_per_s=speed, threads=threads, memory_bytes=memory, matmul=Matmul(matmul)
    ),
    rates,
    st.integers(1, 256),
    st.integers(1, 1 << 40),
    st.dictionaries(st.sampled_from(["bfloat16", "float32", "int8"]), curves, min_size=1),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    choices = draw(st.lists(kinds, min_size=1, max_size=3))
    nodes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    ranks = tuple(
        replace(draw(st.sampled_from(choices)), rank=rank, node=node, host=f"n-{node}")
        for rank, node in enumerate(nodes)
    )
    pairs = draw(st.dictionaries(st.sampled_from([(0, 1), (1, 3)]), links))
    curve = draw(st.none() | st.builds(AllReduce, st.integers(2, 64), curves))
    return Cluster("a: name", ranks, draw(links), draw(links), pairs, curve, None)


@settings(max_examples=40, deadline=None)
@given(clusters())
def test_what_is_written_is_read(given_cluster: Cluster) -> None:
    assert parse_cluster(cluster_to_yaml(given_cluster)) == given_cluster


def test_a_thousand_like_ranks_make_a_short_file(tmp_path: Path) -> None:
    large = cluster(*(rank // 16 for rank in range(1024)))
    write_cluster(large, tmp_path / "new" / "large.yaml")
    assert len((tmp_path / "new" / "large.yaml").read_text().splitlines()) < 200
    assert read_cluster(tmp_path / "new" / "large.yaml") == large
    with pytest.raises(OutputError, match=r"large\.yaml.*cannot be written"):
        write_cluster(large, tmp_path / "new" / "large.yaml" / "x.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threads: 4", "threads: 0", "kinds.kind0.threads: must be a whole number of at least 1, not 0"),
        ("threads: 4", "cores: 4", "kinds.kind0.cores: is no key here"),
        ("    step_s: 0.0002\n", "", "kinds.kind0: lacks the key 'step_s'"),
        ("kind: kind0", "kind: fast", r"hosts\[0\].kind: 'fast' is not among the kinds: kind0"),
        ("ranks: 0-1", "ranks: '0,0'", r"hosts\[0\].ranks: rank 0 is already on host 'node0'"),
        ("ranks: 0-1", "ranks: '0, 5'", "hosts: no host has rank 1, but there are 3 ranks"),
        ("ranks: 0-1", "ranks: some", r"hosts\[0\].ranks: must be ranks such as `0-3, 8`, not 'some'"),
        ("latency_s: 1.0e-06", "latency_s: fast", "links.within_node.latency_s: must be a number of at least 0"),
        ("512: 4", "0: 4", "bfloat16.0: must be a whole number above 0"),
        ("memory_bytes_per_s: 2", "memory_bytes_per_s: -2", "must be a number above 0, not -2"),
    ],
)
def test_errors_name_the_place(old: str, new: str, message: str) -> None:
    text = cluster_to_yaml(cluster(0, 0, 1))
    changed = text.replace(old, new, 1)
    assert changed != text, text
    with pytest.raises(ConfigError, match=rf"file\.yaml:\d+: .*{message}"):
        parse_cluster(changed, "file.yaml")


def test_numbers_as_people_write_them() -> None:
    text = cluster_to_yaml(cluster(0)).replace("attention_bytes_per_s: 10000000000.0", "attention_bytes_per_s: 1e10")
    assert "1e10" in text and parse_cluster(text).ranks[0].attention_bytes_per_s == 1e10


def test_rates_between_the_measured_widths() -> None:
    assert MATMUL.flops_per_s("bfloat16", 1) == 2e10
    assert MATMUL.flops_per_s("bfloat16", 4096) == 4e11
    assert MATMUL.flops_per_s("bfloat16", 128) == pytest.approx(2e11)  # half way on logarithmic axes
    assert MATMUL.flops_per_s("int4", 1) == 4e11  # not measured: bounded by compute alone


@settings(max_examples=50, deadline=None)
@given(curves, st.floats(0.5, 5000), st.floats(0.5, 5000))
def test_interpolation_stays_between_its_points(curve: tuple[tuple[int, float], ...], x: float, y: float) -> None:
    values = [value for _, value in curve]
    assert min(values) * (1 - 1e-9) <= interpolate(curve, x) <= max(values) * (1 + 1e-9)
    rising = tuple(zip([point for point, _ in curve], sorted(values), strict=True))
    low, high = sorted((x, y))
    assert interpolate(rising, low) <= interpolate(rising, high) * (1 + 1e-9)


def test_links_follow_from_where_ranks_lie() -> None:
    special = Link(1e-3, 1e8)
    joined = replace(cluster(0, 0, 1, 2), pairs={(0, 2): special})
    assert joined.link(0, 1) == WITHIN and joined.link(1, 2) == BETWEEN
    assert joined.link(3, 0) == joined.link(0, 3) == special
    assert joined.link(2, 2).seconds(10**9) == 0
    assert joined.all_reduce_s([0, 2], 1e6) == all_reduce_cost_s(BETWEEN, 2, 1e6)
    assert joined.all_reduce_s([0, 2, 3], 1e6) == all_reduce_cost_s(special, 3, 1e6)


def test_an_all_reduce_is_as_measured() -> None:
    measured = replace(cluster(0, 0, 0, 0), within_reduce=AllReduce(2, ((1000, 1e-5), (100_000, 1e-4))))
    assert measured.all_reduce_s([0, 1], 10) == 1e-5
    assert measured.all_reduce_s([0, 1], 10_000) == pytest.approx(10**-4.5)
    assert measured.all_reduce_s([0, 1], 1_000_000) == pytest.approx(1e-3)
    assert measured.all_reduce_s([0, 1, 2, 3], 10) == pytest.approx(2e-5, rel=0.01)  # two rounds in place of one
    assert measured.all_reduce_s([2], 10) == 0


@settings(max_examples=50, deadline=None)
@given(links.filter(lambda link: link.latency_s > 0), st.integers(2, 200), st.integers(0, 10**8), st.integers(0, 10**8))
def test_all_reduces_grow(link: Link, num_ranks: int, small: int, large: int) -> None:
    small, large = sorted((small, large))
    assert all_reduce_cost_s(link, num_ranks, small) <= all_reduce_cost_s(link, num_ranks, large) * (1 + 1e-9)
    assert all_reduce_cost_s(link, num_ranks, large) <= all_reduce_cost_s(link, num_ranks + 1, large) * (1 + 1e-9)


def test_slow_hosts_are_named_among_their_twins() -> None:
    # Two ranks a node; node 2 is slow, node 3 within the noise, node 4 of another kind and alone in it.
    speeds = {0: 1.0, 1: 1.0, 2: 0.7, 3: 0.9, 4: 0.2}
    ranks = [at(rank, rank // 2, speeds[rank // 2]) for rank in range(10)]
    ranks[8:] = [replace(profile, memory_bytes=64 << 30) for profile in ranks[8:]]
    found = Cluster("test", tuple(ranks), WITHIN, BETWEEN).slow_hosts()
    assert {(slow.host, slow.what) for slow in found} == {("node2", "bfloat16 flops/s"), ("node2", "float32 flops/s")}
    assert found[0].rate == pytest.approx(0.7 * found[0].median)


def test_of_two_hosts_the_slower_is_named() -> None:
    found = Cluster("test", (at(0, 0), at(1, 1, 0.8)), WITHIN, BETWEEN).slow_hosts()
    assert {slow.host for slow in found} == {"node1"}


def test_a_profile_of_another_job_is_refused() -> None:
    known = cluster(0, 0, 1, 1)
    known.check([5, 5, 7, 7])
    with pytest.raises(ConfigError, match=r"c\.yaml: hosts: the profile 'test' has 4 ranks, the job 2"):
        known.check([0, 0], "c.yaml")
    with pytest.raises(ConfigError, match="rank 1 lies with rank 0 in the profile 'test', with rank 1 in the job"):
        known.check([0, 1, 0, 1])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "configs" / "clusters").glob("*.yaml")), ids=str)
def test_the_clusters_that_come_along_can_be_read(path: Path) -> None:
    found = read_cluster(path)
    assert found.name == path.stem and parse_cluster(cluster_to_yaml(found)) == found
