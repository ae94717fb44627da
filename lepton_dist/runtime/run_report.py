"""The report of a run: beside the output as JSON and as a page, and in short on the terminal."""

from __future__ import annotations

from pathlib import Path

import msgspec

from lepton_dist.coordinator.report import RunRecord, make_report, report_text
from lepton_dist.coordinator.report_page import report_page
from lepton_dist.storage.durable import replace_file

TOLD_AFTER_S = 10.0
"""Runs shorter than this are mostly their own beginning and end: their reports are not shown, in seconds."""

_PRIVATE = 0o600


def write_report(output: Path, record: RunRecord) -> str:
    """Write OUTPUT.report.json and OUTPUT.report.html; returns what to tell the user, in the end empty for short runs.

    Raises:
        OSError: one of them cannot be written.
    """
    report = make_report(record)
    data, page = (output.with_name(f"{output.name}.report.{ending}") for ending in ("json", "html"))
    replace_file(data, [msgspec.json.format(msgspec.json.encode(report)), b"\n"], mode=_PRIVATE)
    replace_file(page, [report_page(report, output.name).encode()], mode=_PRIVATE)
    return f"{report_text(report)}\nmore in {page}" if record.seconds >= TOLD_AFTER_S else ""
