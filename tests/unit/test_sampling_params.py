"""Sampling parameters: ranges, precedence, seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lepton_dist.config.sampling import SamplingParams, checkpoint_defaults, request_seed
from lepton_dist.errors import CheckpointError, RequestError


def test_defaults_are_openais_with_256_tokens() -> None:
    params = SamplingParams().validated()
    assert params == SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.n, params.seed) == (256, 1.0, 1.0, 1, None)
    assert not params.is_greedy
    assert SamplingParams(temperature=0).validated().is_greedy


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("max_tokens", [1, 10**6], [0, -1, 1.0, "5", True, 2**31]),
        ("temperature", [0, 0.0, 2, 1.5], [-0.1, 2.01, math.nan, math.inf, "1", True, 10**400]),
        ("top_k", [-1, 0, 50], [-2, 1.5, False]),
        ("top_p", [0.01, 1], [0, 1.01, math.nan, None]),
        ("min_p", [0, 1.0], [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0.1, 1, 10.0], [0, -1, math.inf, math.nan]),
        ("presence_penalty", [-2, 2.0], [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2, 2.0], [-2.1, 2.1, -math.inf]),
        ("seed", [0, -(2**63), 2**64 - 1], [2**64, -(2**63) - 1, 1.0, "1", False]),
        ("n", [1, 128], [0, 129, 2.0]),
        ("logprobs", [0, 20], [-1, 21, True]),
        ("prompt_logprobs", [0, 20], [-1, 21, True]),
        ("ignore_eos", [True, False], [0, 1, "true"]),
        ("return_token_ids", [True, False], [0, 1, "true"]),
        ("stop", ["x", ["x", "yz"], ()], ["", ["x", ""], [1], 5, {"a": 1}, "\ud800"]),
        ("stop_token_ids", [[0, 2**31 - 1], ()], [5, [-1], [1.0], [True], "12", [2**31]]),
    ],
)
def test_every_field_has_its_range(field: str, allowed: list[Any], refused: list[Any]) -> None:
    for value in allowed:
        checked = getattr(SamplingParams(**{field: value}).validated(), field)
        assert checked == (tuple([value] if isinstance(value, str) else value) if field.startswith("stop") else value)
    for value in refused:
        if value is None:  # "not given", everywhere
            assert SamplingParams.merged({field: None}) == SamplingParams()
            continue
        with pytest.raises(RequestError, match=field) as error:
            SamplingParams(**{field: value}).validated()
        assert len(str(error.value)) < 200


def test_errors_show_value_and_range_but_no_text() -> None:
    with pytest.raises(RequestError, match=r"temperature is 3\.5; it must be a number from 0 to 2"):
        SamplingParams(temperature=3.5).validated()
    with pytest.raises(RequestError, match="top_p is a string") as error:
        SamplingParams.merged({"top_p": "my secret prompt"})
    assert "secret" not in str(error.value)


def test_the_row_goes_before_options_before_the_checkpoint_before_defaults() -> None:
    row, options = {"temperature": 0.1, "stop": "x", "seed": None}, {"temperature": 0.2, "top_k": 2, "seed": 5}
    checkpoint = checkpoint_defaults({"temperature": 0.3, "top_k": 3, "top_p": 0.3, "eos_token_id": 1})
    params = SamplingParams.merged(row, options, checkpoint)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.1, 2, 0.3, 0.0)
    assert params.stop == ("x",)
    assert params.seed == 5
    with pytest.raises(RequestError, match="'beam_width'"):
        SamplingParams.merged({"beam_width": 2})


def test_the_checkpoints_defaults_are_used_whatever_do_sample_says() -> None:
    found = checkpoint_defaults(
        {"do_sample": False, "temperature": 0.6, "top_k": 20, "top_p": None, "max_new_tokens": 9}
    )
    assert found == {"temperature": 0.6, "top_k": 20}


def test_an_odd_default_of_the_checkpoint_matters_only_where_it_is_needed() -> None:
    odd = checkpoint_defaults({"temperature": 3.0, "top_k": 50.0, "top_p": 0.0, "min_p": "x"})
    assert odd["top_k"] == 50
    with pytest.raises(
        CheckpointError,
        match=r"generation_config\.json: temperature is 3\.0; .* or the option --temperature overrides it",
    ):
        SamplingParams.merged({}, {"top_p": 0.5, "min_p": 0.5}, odd)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 0\.0"):
        SamplingParams.merged({"temperature": 0.5}, {"min_p": 0.1}, odd)
    assert SamplingParams.merged({"temperature": 0.5, "top_p": 1}, {"min_p": 0.1}, odd).top_k == 50
    assert SamplingParams.merged({}, {"temperature": 0}, odd).top_p == 1.0


def test_seeds_are_stable_typed_and_spread() -> None:
    assert request_seed(0, 1) == 9556158170941216160  # printf 0:i:1 | b2sum -l 64
    assert request_seed(0, "é\ud800") != request_seed(0, "é")
    seeds = [request_seed(base, row) for base in (0, 1) for row in [*range(500), *map(str, range(500))]]
    assert len(set(seeds)) == 2000
    assert all(0 <= seed < 2**64 for seed in seeds)
    # Each of the 64 bits is set about half of the time.
    for bit in range(64):
        assert 850 < sum(seed >> bit & 1 for seed in seeds) < 1150
