"""The report of a run: sums that agree with the record, idle ranks named with why, a page that needs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_dist.coordinator.cost_model import Errors, TermRow
from lepton_dist.coordinator.report import (
    NUM_BUCKETS,
    RankRecord,
    ReplicaRecord,
    RunRecord,
    Span,
    make_report,
    report_text,
)
from lepton_dist.coordinator.report_page import report_page
from lepton_dist.coordinator.stage_cost import TERMS, Terms

ERRORS = Errors(100, 0.2, 0.5, 0.03, 0.11, False)
FACTORS = tuple(TermRow(term, 0.1, 2.0 if term == "matmul" else 1.0, 0.1) for term in TERMS)


def span(start: float, seconds: float, busy: float | None = None, tokens: int = 10) -> Span:
    terms = Terms(0.2 * seconds, 0.3 * seconds, 0.1 * seconds, 0.0, 0.0, 0.1 * seconds)
    return Span(start, seconds, seconds if busy is None else busy, 5, tokens, terms)


def replica(*spans: Span) -> ReplicaRecord:
    return ReplicaRecord(spans, num_requests=7, errors=ERRORS, terms=FACTORS)


RUN = RunRecord(
    seconds=100.0,
    replicas=(replica(span(1, 49), span(50, 49)), replica(span(0, 60)), replica()),
    ranks=(
        RankRecord(0, "node0", 0),
        RankRecord(1, "node0", 0, share=0.5),
        RankRecord(2, "node1", 1),
        RankRecord(3, "node<1>", None),
        RankRecord(4, "node1", 2),
    ),
    prior="the cluster <c>",
    predicted_tokens_per_s=0.33,
)


def test_what_was_predicted_and_measured() -> None:
    report = make_report(RUN)
    assert json.loads(json.dumps(report)) == report
    assert (report["tokens"], report["tokens_per_s"]) == (30, 0.3)
    first = report["replicas"][0]
    assert (first["steps"], first["requests"], first["measured_s"]) == (10, 7, 98)
    assert first["predicted_s"] == pytest.approx(0.7 * 98)
    terms = {row["term"]: row for row in first["terms"]}
    assert sum(row["measured_s"] for row in terms.values()) == pytest.approx(98)
    assert terms["matmul"]["predicted_s"] == pytest.approx(0.3 * 98)
    assert terms["matmul"]["measured_s"] / terms["weights"]["measured_s"] == pytest.approx(2 * 0.3 / 0.2)


def test_idle_ranks_are_named_with_the_reason() -> None:
    audit = make_report(RUN)["audit"]
    assert audit == [
        "rank 1 on node0 was idle 51 % of 100.0 s: 49.0 s while it waited for slower ranks of its replica: give it a "
        "larger share",
        "rank 2 on node1 was idle 40 % of 100.0 s: 40.0 s at the end, when its replica had no work left and others had",
        "rank 3 on node<1> was idle for the whole run: the plan leaves it out",
        "rank 4 on node1 was idle for the whole run: replica 2 got no request",
    ]
    gaps = RunRecord(10.0, (replica(span(0, 4, 2), span(6, 4, 2)),), (RankRecord(0, "a", 0),), "typical")
    assert "between steps" in make_report(gaps)["audit"][0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 5), st.floats(0, 1)), min_size=1, max_size=20),
    st.floats(0, 3),
    st.floats(0.1, 1),
)
def test_load_over_time_adds_up_to_the_busy_time(
    pieces: list[tuple[float, float, float]], rest: float, share: float
) -> None:
    spans, now = [], 0.0
    for pause, seconds, busy in pieces:
        spans.append(span(now + pause, seconds, busy * seconds))
        now += pause + seconds
    run = RunRecord(now + rest, (replica(*spans),), (RankRecord(0, "a", 0, share),), "typical")
    report = make_report(run)
    (rank,) = report["ranks"]
    busy_s = sum(piece.busy_s for piece in spans)
    assert rank["busy"] == pytest.approx(share * busy_s / run.seconds, abs=1e-6)
    assert len(rank["load"]) == NUM_BUCKETS and all(0 <= value <= 1 for value in rank["load"])
    assert sum(rank["load"]) / NUM_BUCKETS == pytest.approx(rank["busy"], abs=1e-3)
    assert bool(report["audit"]) == (rank["busy"] < 0.9 - 1e-9) or rank["busy"] == pytest.approx(0.9)


def test_predictions_for_machines_that_nobody_measured_are_not_told() -> None:
    text = report_text(make_report(replace(RUN, is_prior_measured=False)))
    assert "predicted" not in text and "error of a step" not in text and "requests" in text


def test_the_table_tells_the_same() -> None:
    text = report_text(make_report(RUN))
    assert "30 tokens in 100.0 s: 0.3 tokens/s, 0.3 predicted" in text
    assert "prior 20 % (p95 50 %), learned 3 % (p95 11 %)\n" in text and "predicted from the cluster <c>" in text
    assert "rank 3 on node<1> was idle" in text
    matmul = next(line for line in text.splitlines() if line.startswith("matmul"))
    assert [word for word in matmul.split() if word != "s"][1::2] == [f"{0.3 * 98:.2f}", f"{0.3 * 60:.2f}"]
    heads = text.splitlines()[text.splitlines().index(matmul) - 3]
    assert heads.split() == ["replica", "0", "replica", "1"]  # the third ran no step
    fallen = replace(RUN, replicas=(replace(RUN.replicas[0], errors=replace(ERRORS, uses_prior=True)),) * 5, ranks=())
    text = report_text(make_report(fallen))
    assert text.count("fell back to the prior") == 5
    matmul = next(line for line in text.splitlines() if line.startswith("matmul"))
    assert "all replicas" in text and matmul.split()[1] == f"{5 * 0.3 * 98:.2f}"
    many = RunRecord(1.0, (), tuple(RankRecord(rank, "n", None) for rank in range(50)), "typical")
    assert report_text(make_report(many)).endswith("... and 30 more idle ranks: see the report's file")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network() -> None:
    text = report_page(make_report(RUN), "results <1>.jsonl")
    page = Page(text)
    assert page.open == []
    assert "http" not in text and "script" not in {tag for tag, _ in page.seen}
    assert not [attrs for _, attrs in page.seen if {"src", "href"} & set(attrs)]
    assert "the cluster &lt;c&gt;" in text and ">learned<" in text
    assert "results &lt;1&gt;.jsonl" in text and "node&lt;1&gt;" in text and "node<1>" not in text
    rows = [attrs for tag, attrs in page.seen if tag == "rect" and attrs.get("class") == "none"]
    assert len(rows) == len(RUN.ranks)


def test_a_thousand_ranks_are_drawn_by_host() -> None:
    ranks = tuple(RankRecord(rank, f"n{rank // 16}", 0, 0.5 + rank % 2 / 2) for rank in range(1024))
    text = report_page(make_report(RunRecord(10.0, (replica(span(0, 10)),), ranks, "typical")), "large")
    assert text.count('class="none"') == 64
    assert "n63, 16 ranks: 75 %" in text
    assert len(text) < 200_000
