"""A real SLURM on this machine, for the time of a test: a controller, and some nodes that are all this host.

    with slurm_cluster(num_nodes=3) as slurm:
        slurm.run("srun", "-N", "3", "hostname")

Needs root (its daemons run as root, without systemd and without cgroups) and SLURM's and munge's programs;
`reason_to_skip` says what is missing. Ports and files are its own, so it meets no other SLURM.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = "slurm-wlm slurm-client slurmd slurmctld munge slurm-wlm-basic-plugins libpmix-dev libpmi2-0 libpmi0"
START_S = 30.0

# cred_expire makes a requeued job start again in seconds rather than minutes.
CONFIGURATION = """\
ClusterName=lepton
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={control_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=300
Waittime=0
JobRequeue=1
OverTimeLimit=0
SlurmdParameters=config_overrides
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN\n"
)
PARTITION = "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n"


@dataclass(frozen=True)
class Slurm:
    """A running SLURM. `environment` points its client programs at it."""

    folder: Path
    environment: dict[str, str]

    def run(
        self, *words: str, timeout_s: float = 60, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as on a login node, with further environment variables; stdout and stderr are text."""
        environment = {**self.environment, **variables}
        return subprocess.run(
            words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


def reason_to_skip() -> str | None:
    """Why there can be no SLURM here, and what to do about it; None when there can."""
    if os.geteuid() != 0:
        return "a SLURM of our own needs root"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "srun", "sbatch") if find_program(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install -y --no-install-recommends {PACKAGES}"
    return None


def find_program(name: str) -> str | None:
    """A program's path; daemons lie in /usr/sbin, which need not be on PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


@contextmanager
def slurm_cluster(num_nodes: int = 3, cpus_per_node: int = 2) -> Iterator[Slurm]:
    """A SLURM whose nodes are idle at the start of the block, and gone after it.

    Raises:
        RuntimeError: it did not come up; the message holds the ends of the logs.
    """
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="lepton-slurm-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(made))
        folder.chmod(0o755)  # munge refuses a socket that others cannot reach
        names = [f"node{number}" for number in range(1, num_nodes + 1)]
        write_configuration(folder, names, cpus_per_node)
        environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        slurm = Slurm(folder, environment)

        def start(*words: str) -> None:
            program = find_program(words[0])
            assert program is not None
            with (folder / f"{words[0]}.out.log").open("ab") as log:
                process = subprocess.Popen(
                    [program, *words[1:]], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            stack.callback(stop, process)

        munge = folder / "munge"
        start(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.sock", f"--key-file={munge}/key",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        wait_for(slurm, "munge's socket", (folder / "munge.sock").exists)
        start("slurmctld", "-D", "-c")
        for name in names:
            start("slurmd", "-D", "-N", name)
        wait_for(slurm, f"{num_nodes} idle nodes", lambda: num_idle(slurm) == num_nodes)
        stack.callback(slurm.run, "scancel", "-f", "-u", "root")
        yield slurm


def write_configuration(folder: Path, names: list[str], cpus_per_node: int) -> None:
    """The folders, the key and slurm.conf of a cluster."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "munge", *(f"{kind}.{node}" for node in names for kind in ("spool", "tmp"))):
        (folder / name).mkdir(mode=0o700 if name == "munge" else 0o755)
    key = folder / "munge/key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    control_port, *ports = free_ports(1 + len(names))
    text = CONFIGURATION.format(host=host, folder=folder, control_port=control_port)
    for name, port in zip(names, ports, strict=True):
        text += NODE.format(name=name, host=host, port=port, cpus=cpus_per_node)
    (folder / "slurm.conf").write_text(text + PARTITION)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def num_idle(slurm: Slurm) -> int:
    return len(slurm.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split())


def wait_for(slurm: Slurm, what: str, is_there: Callable[[], bool]) -> None:
    """Wait until `is_there()`, at most START_S seconds."""
    end = time.monotonic() + START_S
    while not is_there():
        if time.monotonic() > end:
            raise RuntimeError(f"SLURM came up without {what} in {START_S:.0f} s\n{slurm.logs()}")
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a daemon; kill it when it takes longer than 5 s."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
