"""How long OpenMP's threads spin is said before OpenMP is there, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "import lepton_dist, sys, os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, "False 10000"),
        ({"GOMP_SPINCOUNT": "7"}, "False 7"),
        ({"OMP_WAIT_POLICY": "active"}, "False None"),
        ({"KMP_BLOCKTIME": "1"}, "False None"),
    ],
)
def test_the_users_word_goes_first(said: dict[str, str], found: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    job = subprocess.run([sys.executable, "-c", SHOW], env=kept | said, capture_output=True, text=True, check=True)
    assert job.stdout.strip() == found
