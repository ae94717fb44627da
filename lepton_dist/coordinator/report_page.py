"""The report as one HTML page without scripts or links: the load of every rank over time, and the terms."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import groupby
from typing import Any

_ROW, _WIDTH, _LABEL = 14, 960, 190
_MOST_ROWS = 256
_LEVELS = 10
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --busy: #1a6fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --busy: #58a6ff; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1180px; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
.load { fill: var(--busy); } .none { fill: none; stroke: var(--line); }
"""


def report_page(report: Mapping[str, Any], title: str) -> str:
    """The page of a report (`report.make_report`); `title` may be any text, such as the name of the output."""
    name = escape(title)
    audit = "".join(f"<li>{escape(line)}</li>" for line in report["audit"])
    expected = report["predicted_tokens_per_s"]
    against = "" if expected is None else f" ({expected:.1f} predicted)"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{name}</h1>\n<p>{report['tokens']} tokens in {report['seconds']:.1f} s: "
        f"{report['tokens_per_s']:.1f} tokens/s{against}</p>\n"
        f"<h2>Load</h2>\n{_chart(report)}\n"
        + (f"<h2>Idle more than a tenth of the time</h2>\n<ul>{audit}</ul>\n" if audit else "")
        + f"<h2>Predicted and measured</h2>\n<p>Predicted from {escape(report['prior'])}. Errors are those of "
        f"single steps, in the median and at 95 %.</p>\n{_replicas(report)}\n{_terms(report)}\n</body></html>\n"
    )


def _chart(report: Mapping[str, Any]) -> str:
    """A row for each rank, or for each host where there are many; the darker, the busier."""
    rows = [(f"rank {row['rank']}, {row['host']}", row["load"], row["busy"]) for row in report["ranks"]]
    if len(rows) > _MOST_ROWS:
        rows = _by_host(report)
    height = len(rows) * _ROW + 24
    parts = [f'<svg viewBox="0 0 {_LABEL + _WIDTH} {height}" role="img" aria-label="Load of ranks over time">']
    for index, (label, load, busy) in enumerate(rows):
        parts.append(_line(index * _ROW, label, load, busy))
    for tenth in range(0, 11, 2):
        at = _LABEL + (_WIDTH - 40) * tenth / 10
        parts.append(f'<text x="{at:.0f}" y="{height - 6}">{report["seconds"] * tenth / 10:.1f} s</text>')
    return "".join(parts) + "</svg>"


def _line(top: int, label: str, load: list[float], busy: float) -> str:
    width = _WIDTH / len(load)
    parts = [
        f'<text x="0" y="{top + _ROW - 4}">{escape(label)}: {100 * busy:.0f} %</text>'
        f'<rect class="none" x="{_LABEL}" y="{top}" width="{_WIDTH}" height="{_ROW - 2}"/>'
    ]
    start = 0
    for level, run in groupby(round(value * _LEVELS) for value in load):
        count = len(list(run))
        if level:
            parts.append(
                f'<rect class="load" opacity="{level / _LEVELS:g}" x="{_LABEL + start * width:.1f}" y="{top}" '
                f'width="{count * width:.1f}" height="{_ROW - 2}"/>'
            )
        start += count
    return "".join(parts)


def _by_host(report: Mapping[str, Any]) -> list[tuple[str, list[float], float]]:
    hosts: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["ranks"]:
        hosts.setdefault(row["host"], []).append(row)
    return [
        (
            f"{host}, {len(rows)} ranks",
            [sum(values) / len(rows) for values in zip(*(row["load"] for row in rows), strict=True)],
            sum(row["busy"] for row in rows) / len(rows),
        )
        for host, rows in hosts.items()
    ]


def _replicas(report: Mapping[str, Any]) -> str:
    head = (
        "replica",
        "requests",
        "steps",
        "tokens",
        "measured s",
        "predicted s",
        "prior's error",
        "p95",
        "learned",
        "p95",
        "in use",
    )
    rows = []
    for row in report["replicas"]:
        errors = row["errors"] or {}
        cells = [str(row[key]) for key in ("replica", "requests", "steps", "tokens")]
        cells += ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("measured_s", "predicted_s")]
        names = ("prior_median", "prior_p95", "learned_median", "learned_p95")
        cells += [f"{100 * errors[name]:.1f} %" if name in errors else "-" for name in names]
        cells.append("-" if not errors else "prior" if errors["uses_prior"] else "learned")
        rows.append(cells)
    return _table(head, rows)


def _terms(report: Mapping[str, Any]) -> str:
    rows = [
        [f"replica {row['replica']}: {term['term']}"]
        + [f"{term[key]:.3f}" for key in ("predicted_s", "measured_s", "factor")]
        for row in report["replicas"][:_MOST_ROWS]
        for term in row["terms"]
    ]
    return _table(("term", "predicted s", "measured s, as learned", "factor"), rows) if rows else ""


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
