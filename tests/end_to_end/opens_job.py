"""`lepton-dist` with its arguments, which writes at its end how often this process has read each file of a folder."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

from lepton_dist.cli.main import main

opened: Counter[str] = Counter()


def note(event: str, arguments: tuple[object, ...]) -> None:
    """Count an opening of a file of the folder that is read whole, or its header."""
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = Path(os.fsdecode(arguments[0]))
        # Whole files and headers are opened so that a pipe would not block; data, by threads that only read, are not.
        if path.parent == folder and isinstance(arguments[2], int) and arguments[2] & os.O_NONBLOCK:
            opened[path.name] += 1


folder, report = Path(sys.argv[1]), Path(sys.argv[2])
sys.addaudithook(note)
try:
    code = main(sys.argv[3:])
finally:
    rank = os.environ.get("PMI_RANK", "0")
    (report / f"opened-{rank}.json").write_text(json.dumps(opened))
sys.exit(code)
