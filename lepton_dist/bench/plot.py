"""The figures of a comparison as a picture: a panel a case, a bar a setting, the range of the repeats and the limit."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from lepton_dist.bench.measure import Figure
from lepton_dist.errors import UsageError
from lepton_dist.storage.outputs import write_output


def check_plotting() -> None:
    """Refuse before anything is measured.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'lepton-dist[plot]'")


def write_plot(path: Path, title: str, table: Mapping[str, list[Figure]]) -> None:
    """Write a PNG with every case of `table`, which holds the figures of each setting.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure as Picture  # an optional extra; `check_plotting` has been asked

    cases = list(dict.fromkeys(figure.case for figures in table.values() for figure in figures))
    picture = Picture(figsize=(3.0 * len(cases), 0.5 * len(table) + 1.6), layout="constrained")
    picture.suptitle(title)
    panels = picture.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    panels[0].set_yticks(range(len(table)), list(table))
    panels[0].invert_yaxis()
    for panel, case in zip(panels, cases, strict=True):
        found = {row: figure for row, figures in enumerate(table.values()) for figure in figures if figure.case == case}
        values = [figure.value for figure in found.values()]
        below = [figure.value - figure.lowest for figure in found.values()]
        above = [figure.highest - figure.value for figure in found.values()]
        bars = panel.barh(list(found), values, xerr=[below, above], color="#4477aa", ecolor="#222222", capsize=3)
        panel.bar_label(bars, fmt="%.4g", label_type="center", color="white")
        limits = [figure.limit for figure in found.values() if figure.limit is not None]
        if limits:
            panel.axvline(max(limits), color="#cc3311", linestyle="--")
        panel.set_title(case)
        panel.set_xlabel(next(iter(found.values())).unit + (" (dashed: the limit)" if limits else ""))
    drawn = BytesIO()
    picture.savefig(drawn, dpi=120, format="png")
    write_output(path, drawn.getvalue())
