"""The guardian: a small process beside a rank that ends the rank when the rank cannot end itself.

A rank that is stopped (SIGSTOP) or whose launcher was killed cannot run a line of code to leave, and the others would
wait for it. Its guardian watches it through /proc and kills it; the launcher or the others' deadlines do the rest.
Run as a script (by `start_guardian`) this file imports the standard library only, and little of that: it stays small.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # what type checkers take for true; importing it from typing would double this process's start
if TYPE_CHECKING:
    from typing import IO

POLL_S = 0.25
"""Time between two looks at the rank, in seconds."""

STOPPED_S = 3.0
"""How long a rank may be stopped. Counted in polls: a guardian suspended together with its rank does not count."""

LAUNCHERS = frozenset(
    (
        "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_pr",  # MPICH, Intel MPI
        "prterun", "prted", "prte", "orterun", "orted",  # Open MPI
        "slurmstepd", "srun", "pals_tmrshd", "palsd", "aprun",  # SLURM, Cray
    )
)  # fmt: skip
"""Names of launcher processes as the kernel shows them: at most 15 characters."""


class Process:
    """One process at one time, as /proc shows it; `start` (clock ticks since boot) tells a reused pid apart."""

    __slots__ = ("name", "parent", "pid", "start", "state")

    def __init__(self, pid: int, name: str, state: str, parent: int, start: int) -> None:
        self.pid, self.name, self.state, self.parent, self.start = pid, name, state, parent, start

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return self.state not in "ZXx"


def look_at(pid: int) -> Process | None:
    """What /proc says about a process, or None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 (pathlib would double this process's memory)
            text = file.read().decode("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may hold anything, brackets and blanks too: the fields begin after the last one.
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return Process(pid, name, fields[0], int(fields[1]), int(fields[19]))


def same_process(before: Process) -> Process | None:
    """The same process now, or None when it is gone, even if another one has its pid."""
    now = look_at(before.pid)
    return now if now is not None and now.start == before.start and now.is_alive else None


def launchers_of(rank: Process, *, is_parallel: bool) -> tuple[Process, ...]:
    """The processes whose end must end the rank: from its parent up to the last of the launchers above it.

    Between a rank and its launcher may stand a shell script of the user's. Above the launchers stands the user's
    shell, which may well go first (nohup). Where no launcher is known by name, a rank of several takes its parent
    for one, and a rank alone has none.
    """
    chain: list[Process] = []
    length = 0
    process = look_at(rank.parent)
    while process is not None and process.pid > 1:
        chain.append(process)
        if process.name in LAUNCHERS:
            length = len(chain)
        elif length:
            break
        process = look_at(process.parent)
    if not length and is_parallel:
        length = 1
    return tuple(chain[:length])


def watch(rank: Process, launchers: tuple[Process, ...], label: str, pipe: int) -> None:
    """Watch a rank until it ends, or end it. `pipe` reaches its end of file as soon as the rank is gone."""
    polls = round(STOPPED_S / POLL_S)
    stopped = silent = 0
    allowed_s = 0.0  # silence that the rank has announced; 0 is any
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    while True:
        if poller.poll(POLL_S * 1000):
            beats = os.read(pipe, 4096)
            if not beats:
                return
            allowed_s, silent = last_beat(beats, allowed_s), 0
            continue
        silent += 1
        now = same_process(rank)
        if now is None:
            return
        above = [same_process(launcher) for launcher in launchers]
        if None in above:
            end(rank, f"lepton-dist: {label} lost its launcher; leaving")
            return
        # A job that was suspended as a whole has stopped launchers too; it will be continued.
        is_suspended = any(launcher is not None and launcher.state == "T" for launcher in above)
        stopped = stopped + 1 if now.state == "T" and not is_suspended else 0
        if stopped >= polls:
            end(rank, f"lepton-dist: {label} has been stopped for {STOPPED_S:.0f} s; killing it")
            return
        if now.state == "T" or is_suspended:
            silent = 0
        elif allowed_s and silent * POLL_S >= allowed_s:
            # Aborted, it still writes where its threads were: that needs no interpreter.
            end(rank, f"lepton-dist: {label} gave no sign of life for {allowed_s:g} s; ending it", by=signal.SIGABRT)
            time.sleep(POLL_S)
            end(rank, "")
            return


def last_beat(beats: bytes, before: float) -> float:
    """The seconds of silence that the last whole beat allows; `before` where there is none. A beat is a line."""
    for word in reversed(beats.split()):
        try:
            return float(word)
        except ValueError:
            continue
    return before


def end(rank: Process, message: str, by: int = signal.SIGKILL) -> None:
    """Say why on stderr, if anyone still reads it, and end the rank by a signal."""
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    # A full pipe that nobody empties must not keep the guardian from its work.
    if message and any(event & select.POLLOUT and not event & select.POLLERR for _, event in poller.poll(0)):
        os.write(2, f"{message}\n".encode())
    if same_process(rank) is not None:
        try:
            os.kill(rank.pid, by)
        except ProcessLookupError:
            return  # it went by itself in between: just as well


def main(arguments: list[str]) -> None:
    """The guardian's process: `arguments` are the rank's pid, 1 or 0 for `is_parallel`, and the label."""
    # A signal to the whole group (Ctrl-C, SLURM's) is the rank's to answer: the guardian ends when its rank does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    rank = look_at(int(arguments[0]))
    if rank is not None and rank.is_alive:
        watch(rank, launchers_of(rank, is_parallel=arguments[1] == "1"), arguments[2], pipe=0)


class Guardian:
    """A running guardian. It needs no closing: it ends with the process that started it."""

    def __init__(self, pid: int, pipe: IO[bytes]) -> None:
        self.pid = pid
        self._pipe = pipe

    def beat(self, silence_s: float) -> None:
        """Say that the rank's interpreter runs, and for how many seconds it may be silent from now; 0 is any time."""
        try:
            os.write(self._pipe.fileno(), b"%.1f\n" % silence_s)
        except (OSError, ValueError):
            return  # it has gone, was sent away, or is stopped and has not read the last ones

    def close(self) -> None:
        """Send the guardian away while its rank lives on. Closing twice does nothing."""
        if self._pipe.closed:
            return
        self._pipe.close()
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            return  # already collected, for instance by a handler of SIGCHLD


def start_guardian(rank: int, *, world_size: int, host: str) -> Guardian:
    """Start the guardian of the calling process.

    Call it once in each rank, before MPI starts: some fabrics do not like a fork afterwards. `rank`, `world_size` and
    `host` are for the message, and for telling a rank alone (which outlives its parent, as under nohup) from others.

    Raises:
        OSError: no process could be started.
    """
    import subprocess  # here and not above: the guardian's own process does without it

    pid = os.getpid()
    label = f"rank {rank} on host {host} (pid {pid})"
    # -I -S: nothing of the environment, of the rank's packages or of this folder is imported. Its stdin is a pipe
    # from the rank, for its end; stdout is not the launcher's, which would wait for it; stderr is, for the message.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(pid), "1" if world_size > 1 else "0", label],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
    )
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    process.returncode = 0  # it is not waited for: without this Popen complains at the rank's exit
    return Guardian(process.pid, process.stdin)


if __name__ == "__main__":
    main(sys.argv[1:])
