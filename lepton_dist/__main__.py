"""`python -m lepton_dist`: the same as `lepton-dist`."""

from __future__ import annotations

import sys

from lepton_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
