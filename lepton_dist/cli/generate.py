"""`lepton-dist generate`: complete a file of prompts over all the ranks of the job."""

from __future__ import annotations

import argparse

from lepton_dist.cli.deferral import leave_out_compiler
from lepton_dist.cli.imports import lasting_imports
from lepton_dist.config.generate import add_generate_options, load_generate_config
from lepton_dist.runtime.head_start import loading_ahead


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this command."""
    add_generate_options(parser)


def run_command(options: argparse.Namespace) -> int:
    """Raises UsageError before MPI starts when the options themselves are wrong."""
    config = load_generate_config(options.config, vars(options))
    with loading_ahead(config.model, config.plan, config.dtype) as has_begun:
        if has_begun:
            leave_out_compiler()
        with lasting_imports():
            from lepton_dist.runtime.batch_run import run_batch
            from lepton_dist.runtime.run import run
        return run(lambda controller, interrupts: run_batch(controller, interrupts, config))
