"""The files of a batch run: what it reads must not be what it writes."""

from __future__ import annotations

from lepton_dist.config.generate import GenerateConfig
from lepton_dist.runtime.run_report import report_paths
from lepton_dist.storage.output_files import files_of_output
from lepton_dist.storage.outputs import refuse_overwriting


def check_run_files(config: GenerateConfig, cluster: str | None) -> None:
    """See that no file of the run is written over; `cluster` is the cluster file that the plan names.

    Raises:
        OutputError: names both.
    """
    output, *beside = files_of_output(config.output)
    reports = report_paths(output)
    written = {"the output": output, "the decision log": config.decision_log}
    read = {
        "the input": config.input,
        "the plan": config.plan,
        "the run file": config.run_file,
        "the cluster file": cluster,
    }
    refuse_overwriting(written, {"the model": config.model, **read})
    # Their names are no model's: a run whose output lies in the model's directory finds its own there.
    kept = {f"{path.name}, which a run keeps beside its output,": path for path in (*beside, *reports)}
    refuse_overwriting({**written, **kept}, read)
