"""A job that runs several `lepton-dist` commands one after the other in the same ranks, which saves their start-up.

Reads a JSON list of argument lists; rank 0 prints for each a JSON line with every rank's exit code and what they
printed. It starts MPI itself, so that no command ends it.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from mpi4py import MPI

from lepton_dist.cli.main import main


def run(arguments: list[str]) -> tuple[int, str]:
    """One command's exit code, and what it printed to both streams."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return code, printed.getvalue()


for words in json.loads(Path(sys.argv[1]).read_text()):
    ends = MPI.COMM_WORLD.gather(run(words))
    if ends is not None:
        print(json.dumps({"codes": [end[0] for end in ends], "printed": [end[1] for end in ends]}), flush=True)
