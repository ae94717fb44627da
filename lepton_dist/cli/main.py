"""`lepton-dist COMMAND`: starts the rank's guardian, finds the command, and prints usage errors once (exit code 2)."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO

from lepton_dist.cli.imports import lasting_imports
from lepton_dist.comm.launcher import read_launcher
from lepton_dist.comm.shared_memory import shortage
from lepton_dist.errors import EXIT_DONE, EXIT_USAGE, LeptonError, UsageError
from lepton_dist.runtime.guardian import Guardian, start_guardian
from lepton_dist.runtime.heartbeat import heartbeat
from lepton_dist.runtime.interrupts import leave_on_interrupts
from lepton_dist.telemetry.streams import drop_stdout, secure_standard_streams
from lepton_dist.telemetry.voice import notice, report

COMMANDS = {
    "generate": "complete a file of prompts; resumable",
    "inspect": "show what each rank holds of a model under a plan, without starting MPI",
    "bench": "measure load, prefill, decode and an offline batch, against the limits of the machine",
    "profile": "measure the ranks and their links into a cluster file, for plans and predictions",
    "plan": "find the best plan for a model, a cluster and a workload, without starting MPI",
    "simulate": "what a workload would take under a plan on a profiled cluster, without MPI",
    "doctor": "check MPI, launcher, cores, shared memory, links and model files",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code of the process, the same on every rank."""
    secure_standard_streams()
    launcher = read_launcher()
    leave_on_interrupts(is_quiet=launcher.rank != 0, by_signal=launcher.kind == "mpich" and launcher.size > 1)
    if problem := shortage(launcher):
        # Long before MPI starts: a rank that dies in there takes with it what the others have not said yet.
        notice(problem)
    # Before anything heavy is imported: from here on a rank that is stopped does not go unseen.
    guardian: Guardian | None = None
    if launcher.kind != "none":
        guardian = start_guardian(launcher.rank, world_size=launcher.size, host=socket.gethostname())
        heartbeat().attach(guardian)
    with ExitStack() as quiet:
        if launcher.rank != 0:
            # Every rank meets the same usage error; rank 0 says so.
            quiet.enter_context(redirect_stderr(StringIO()))
            quiet.enter_context(redirect_stdout(StringIO()))
        name, rest = _split(sys.argv[1:] if arguments is None else arguments)
        with lasting_imports():
            module = import_module(f"lepton_dist.cli.{name}")
        parser = argparse.ArgumentParser(prog=f"lepton-dist {name}", description=COMMANDS[name].capitalize() + ".")
        module.add_options(parser)
        options = parser.parse_args(rest)
    try:
        code = int(module.run_command(options))
        return code if _flushed() else EXIT_USAGE
    except LeptonError as error:
        if launcher.rank == 0:
            report(error)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output (`| head`) has left: nobody is there to be told.
        drop_stdout()
        return EXIT_DONE
    finally:
        if guardian is not None:
            heartbeat().attach(None)
            guardian.close()


def _flushed() -> bool:
    """Whether all that was printed is where it was to go; a reader that has left (`| head`) wants no more of it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
    except OSError as error:
        drop_stdout()
        report(UsageError(f"what was printed is not complete: stdout: {error.strerror}"))
        return False
    return True


def _split(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command and its own arguments; without any, the commands are listed."""
    listing = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lepton-dist",
        description="Large language models over MPI.",
        epilog=f"commands:\n{listing}\n\nlepton-dist COMMAND --help tells more",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--version", action="store_true", help="show the version and leave")
    if not arguments:
        parser.print_help()
        sys.exit(EXIT_USAGE)
    first = arguments[0]
    if first == "help":
        return _split([*arguments[1:2], "--help"])
    if first == "--version":
        from importlib.metadata import version  # not above: it takes longer than the rest of this file

        print(f"lepton-dist {version('lepton-dist')}")
        sys.exit(EXIT_DONE)
    if not first.startswith("-") and first not in COMMANDS:
        parser.error(f"there is no command {first!r}; known: {', '.join(COMMANDS)}")
    return parser.parse_args([first]).command, arguments[1:]


if __name__ == "__main__":
    sys.exit(main())
