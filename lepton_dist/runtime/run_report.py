"""The report of a run: beside the output as JSON and as a page, and in short on the terminal."""

from __future__ import annotations

import errno
from pathlib import Path

import msgspec

from lepton_dist.coordinator.report import RunRecord, make_report, report_text
from lepton_dist.coordinator.report_page import report_page
from lepton_dist.storage.durable import replace_file

TOLD_AFTER_S = 10.0
"""Runs shorter than this are mostly their own beginning and end: their reports are not shown, in seconds."""

# What an earlier report holds, by which it is told from a file of the user's own.
_MARKS = {"json": b'"predicted_tokens_per_s"', "html": b"<h2>Predicted and measured</h2>"}


def report_paths(output: Path) -> tuple[Path, Path]:
    """OUTPUT.report.json and OUTPUT.report.html."""
    data, page = (output.with_name(f"{output.name}.report.{ending}") for ending in _MARKS)
    return data, page


def write_report(output: Path, record: RunRecord) -> str:
    """Write OUTPUT.report.json and OUTPUT.report.html; returns what to tell the user, in the end empty for short runs.

    Raises:
        OSError: one of them cannot be written, or would overwrite a file that is no report.
    """
    report = make_report(record)
    data, page = report_paths(output)
    for path, mark in zip((data, page), _MARKS.values(), strict=True):
        if path.exists() and mark not in path.read_bytes():
            raise FileExistsError(errno.EEXIST, f"{path} exists and is no report", str(path))
    replace_file(data, [msgspec.json.format(msgspec.json.encode(report)), b"\n"], is_durable=False)
    replace_file(page, [report_page(report, output.name).encode()], is_durable=False)
    return f"{report_text(report)}\nmore in {page}" if record.seconds >= TOLD_AFTER_S else ""
