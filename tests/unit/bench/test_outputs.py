"""Peak memory, pictures and the peer of `lepton-dist bench`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from lepton_dist.bench import peer, plot
from lepton_dist.bench.measure import Figure
from lepton_dist.bench.memory import own_peak, rank_pids
from lepton_dist.bench.peer import PeerOrder, Transformers, missing_peer
from lepton_dist.bench.shapes import shaped_model
from lepton_dist.errors import LeptonError, UsageError


def test_a_peak_is_seen_after_the_memory_is_gone_and_forgotten_at_a_reset() -> None:
    memory = own_peak()
    memory.reset()
    before = memory.bytes()
    if before is None:
        pytest.skip("this system does not tell peaks")
    block = bytearray(os.urandom(1 << 20) * 192)
    del block
    peak = memory.bytes()
    assert peak is not None and peak - before > 150 << 20
    memory.reset()
    after = memory.bytes()
    assert after is not None and peak - after > 100 << 20


def test_a_rank_alone_is_this_process() -> None:
    assert rank_pids(1) == [os.getpid()]


def figures(rate: float) -> list[Figure]:
    return [Figure("load", 1.0, 1.0, 1.0, "s"), Figure("prefill", rate, rate - 1, rate + 2, "tokens/s", 60.0)]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "figures.png"
    plot.write_plot(path, "tiny", {"tp2": figures(30.0), "peer": figures(20.0)[1:]})
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="cannot be written"):
        plot.write_plot(tmp_path / "no" / "folder.png", "tiny", {"tp2": figures(30.0)})


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lepton-dist\[plot\]'"):
        plot.check_plotting()
    assert "transformers is skipped" in str(missing_peer("transformers"))


def test_a_peer_measures_the_same_cases(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    order = PeerOrder(str(shaped_model("tiny", tmp_path)), ["prefill", "decode b8"], 1, 2, torch.get_num_threads())
    transformers = Transformers(order)
    found = [transformers.load, *map(transformers.case, order.cases)]
    assert [figure.case for figure in found] == ["load", "prefill", "decode b8"]
    assert all(figure.value > 0 for figure in found)
    assert msgspec.json.decode(msgspec.json.encode(found), type=list[Figure]) == found


def test_a_peer_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LeptonError, match="ended with 1"):
        peer.measure_peer(PeerOrder("none", [], 1, 1, 1), lambda: None)
