"""When a row that has no numbers is told as failed, and when the model is."""

from __future__ import annotations

from lepton_dist.runtime.soundness import Soundness
from lepton_dist.text.completion import RequestOutput

FAILED = RequestOutput(prompt_tokens=1, completions=[], failure="not numbers")
DONE = RequestOutput(prompt_tokens=1, completions=[])


def test_a_failed_row_is_told_at_once_where_another_came_through() -> None:
    soundness = Soundness(100)
    assert soundness.ended("s:good", DONE) == [("s:good", DONE)]
    assert soundness.ended("s:bad", FAILED) == [("s:bad", FAILED)]
    assert not soundness.probes() and not soundness.is_broken and soundness.num_withheld == 0


def test_before_that_it_is_held_back_until_a_row_or_a_probe_comes_through() -> None:
    for key in ("i:3", None):
        soundness = Soundness(100)
        assert soundness.ended("s:bad", FAILED) == [] and soundness.num_withheld == 1
        probes = soundness.probes()
        assert len(probes) == 8 and len({probe.prompt[0] for probe in probes}) == 8
        assert all(soundness.is_probe(probe.key) and 0 <= probe.prompt[0] < 100 for probe in probes)
        assert not soundness.probes(), "once is enough"
        assert soundness.ended("s:worse", FAILED) == []
        assert soundness.ended(probes[0].key, FAILED) == []
        told = soundness.ended(key or probes[1].key, DONE)
        assert told == [("s:bad", FAILED), ("s:worse", FAILED), *([(key, DONE)] if key else [])]
        assert [soundness.ended(probe.key, FAILED) for probe in probes[2:]] == [[]] * 6
        assert not soundness.is_broken


def test_a_model_that_fails_every_probe_is_broken_and_no_row_has_failed() -> None:
    soundness = Soundness(5)  # fewer tokens than probes
    soundness.ended("s:bad", FAILED)
    probes = soundness.probes()
    assert len(probes) == 5
    for probe in probes:
        assert not soundness.is_broken
        assert soundness.ended(probe.key, FAILED) == []
    assert soundness.is_broken


def test_probes_of_rows_that_were_given_up_count_for_nothing() -> None:
    soundness = Soundness(100)
    soundness.ended("s:bad", FAILED)
    late = soundness.probes()
    soundness = soundness.anew()
    assert soundness.num_withheld == 0 and not soundness.probes()
    assert [soundness.ended(probe.key, FAILED) for probe in late] == [[]] * 8 and not soundness.is_broken
    soundness.ended("s:again", FAILED)
    assert not {probe.key for probe in soundness.probes()} & {probe.key for probe in late}
