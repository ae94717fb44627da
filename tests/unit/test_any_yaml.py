"""Files that a user writes, with anything in any place: an error with a file and a key, or a value that can be used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_dist.config.generate import load_generate_config
from lepton_dist.coordinator.cluster_document import cluster_from_document, cluster_to_yaml
from lepton_dist.documents import parse_yaml
from lepton_dist.errors import UsageError
from lepton_dist.plan.document import parse_plan, plan_to_yaml
from lepton_dist.plan.placement import seats
from tests.unit.bench.test_limits import SHAPE, cluster

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**25, -(10**25)]),
    st.sampled_from([0.0, -0.5, 1.5, float("nan"), float("inf"), 1e308]),
    st.sampled_from(["", "auto", "int8", "float32", "cpu", "nonsense", "9" * 30, "a\0b", "\ud7ff", "../x", "1GiB"]),
    st.sampled_from([[], [[]], [0, 0], [None], {}, {"a": 1}, [{"ranks": [0]}], {1: 2}]),
)
FULL_PLAN = {
    "replicas": [
        {"stages": [{"ranks": [0, 1], "layers": 3, "shares": [2, 1], "device": "cpu"}, {"ranks": [2], "layers": 1}]}
    ],
    "device": "cpu",
    "ranks_per_gpu": 1,
    "precision": {"weights": "bfloat16", "kv_cache": "bfloat16", "wire": "int8"},
    "engine": {
        "block_tokens": 16, "max_batch_tokens": 512, "max_sequences": 64, "kv_cache_bytes": "1GiB",
        "context_tokens": "auto", "prefix_cache": True, "overlap": True, "balancer": "predicted",
        "step_timeout_s": 5, "load_timeout_s": 60.0,
    },
    "estimate": {"tokens_per_s": 3.0},
    "cluster": "c.yaml",
}  # fmt: skip
FULL_RUN = {
    "model": "m", "input": "i", "output": "o", "plan": "p", "dtype": "float32", "threads": 1, "seed": 1, "grace_s": 2.0,
    "overwrite": True, "retry_errors": False, "show": False, "decision_log": "d",
    "sampling": {"max_tokens": 1, "temperature": 0.5, "top_k": 1, "stop": ["x"], "stop_token_ids": [1], "n": 2},
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def spoilt(document: Any, data: st.DataObject) -> Any:
    """A copy with something odd in one or two places, or with a key gone."""
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(places(document)[1:]))
        holder = document
        for key in outer:
            holder = holder[key]
        if isinstance(holder, dict) and data.draw(st.integers(0, 9)) == 0:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(data.draw(ODD))
        if not places(document)[1:]:
            break
    return document


MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(st.data())
def test_plans(data: st.DataObject) -> None:
    text = yaml.safe_dump(spoilt(FULL_PLAN, data))
    try:
        plan = parse_plan(text, "spoilt").laid_out([0, 0, 0])
        resolved = plan.resolve(SHAPE, 3)
    except UsageError as error:
        assert str(error)
        return
    assert seats(resolved, SHAPE)
    assert seats(parse_plan(plan_to_yaml(resolved)).resolve(SHAPE, 3), SHAPE) == seats(resolved, SHAPE)


@MANY
@given(st.data())
def test_run_files(data: st.DataObject) -> None:
    path = Path("/tmp/unused")
    text = yaml.safe_dump(spoilt(FULL_RUN, data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lepton_dist.config.generate.read_yaml", lambda name: parse_yaml(text, str(name)))
        try:
            config = load_generate_config(str(path), {})
        except UsageError as error:
            assert str(error)
            return
    assert config.threads >= 0 and config.grace_s >= 0 and config.model


@MANY
@given(st.data())
def test_cluster_files(data: st.DataObject) -> None:
    document = yaml.safe_load(cluster_to_yaml(cluster(2)))
    text = yaml.safe_dump(spoilt(document, data))
    try:
        assert cluster_from_document(parse_yaml(text, "spoilt")).ranks
    except UsageError as error:
        assert str(error)
