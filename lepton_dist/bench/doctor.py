"""`doctor`: what a job would find on these machines, told in a few seconds, with what to do about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import msgspec

from lepton_dist.bench.doctor_check import Check, table
from lepton_dist.bench.doctor_devices import check_devices
from lepton_dist.bench.doctor_links import check_links
from lepton_dist.bench.doctor_local import check_mpi_alone, check_output
from lepton_dist.bench.doctor_machine import Site, check_machines
from lepton_dist.bench.doctor_model import check_model, check_plan
from lepton_dist.comm.launcher import read_launcher
from lepton_dist.errors import EXIT_DONE, EXIT_USAGE
from lepton_dist.runtime.controller import Controller
from lepton_dist.runtime.facts import RankFacts


@dataclass(frozen=True)
class DoctorConfig:
    """What to look at besides the machines: all of it optional. `as_json` prints one JSON object instead of a table."""

    model: str | None = None
    plan: str | None = None
    dtype: str | None = None
    output: str | None = None
    as_json: bool = False


def diagnose(controller: Controller, config: DoctorConfig) -> int:
    """Examine the job from rank 0 and print what was found; 0, or 2 when a check failed.

    Raises:
        RankLostError: a rank does not answer.
    """
    facts = controller.examine(config.model or "")
    world = controller.world
    site = Site(world.hosts, world.nodes, read_launcher(), world.library)
    checks = find(site, facts, config)
    failed = [check for check in checks if check.verdict == "FAIL"]
    warned = [check for check in checks if check.verdict == "WARN"]
    if config.as_json:
        report = {
            "verdict": "FAIL" if failed else "WARN" if warned else "OK",
            "checks": [check.as_dict() for check in checks],
            "hosts": list(site.hosts),
            "nodes": list(site.nodes),
            "ranks": facts,
        }
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        print(table(checks))
        print(f"\n{len(checks)} checks: {len(failed)} failed, {len(warned)} warning(s)")
    sys.stdout.flush()
    return EXIT_USAGE if failed else EXIT_DONE


def find(site: Site, facts: list[RankFacts], config: DoctorConfig) -> list[Check]:
    """All checks, in the order in which they are shown."""
    checks = check_machines(site, facts)
    if len(site.hosts) == 1:
        checks.insert(1, check_mpi_alone())
    checks.append(check_devices(site, facts))
    checks += check_links(site, facts)
    if config.output is not None:
        checks.append(check_output(config.output))
    if config.model is not None:
        checks += check_model(site, facts, config.model)
    if config.plan is not None or config.model is not None:
        checks.append(check_plan(site, facts, config.model, config.plan, config.dtype))
    return checks
