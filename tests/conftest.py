"""What all tests share: property tests without deadlines, and an environment without a launcher's variables."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

import lepton_dist  # noqa: F401  # before torch: it says how long torch's threads spin

# The machines that run these tests are shared, so a slow example says nothing; and a failure must come back.
hypothesis.settings.register_profile("shared-machine", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("shared-machine")

LAUNCHER_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "MPI_LOCAL", "SLURM_", "HYDRA_", "HYDI_")


def pytest_configure(config: pytest.Config) -> None:
    """Tests start launchers of their own: one that runs inside a job must not show through to them."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_VARIABLES):
            del os.environ[name]
    # A shell that runs us in the background ignores SIGINT, nohup SIGHUP; what we start would inherit that, and a shell
    # script cannot even undo it.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
