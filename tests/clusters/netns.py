"""Several hosts on one machine: network namespaces with their own host names and real traffic between them.

    with network_hosts(3) as hosts:
        subprocess.run(hosts.mpirun(bin_folder, 3, sys.executable, "x.py"), ...)

Needs root and iproute2; `reason_to_skip` says what is missing. Two runs at once do not meet: every run has names and
a subnet of its own. Memory and file system are shared, as between nodes with a shared file system.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

# Stands in for ssh: AGENT [ssh options] HOST WORDS... runs the words through a shell on that host.
AGENT = """#!/bin/sh
PATH=$PATH:/usr/sbin:/sbin
while :; do
    case $1 in
    -[bcDEeFIiLlmOopQRSWw]) shift 2 ;;
    -*) shift ;;
    *) break ;;
    esac
done
host=$1
shift
exec ip netns exec "$host" unshare -u sh -c 'hostname "$0"; exec sh -c "$1"' "$host" "$*"
"""


_SETS = itertools.count()


@dataclass(frozen=True)
class Hosts:
    """A handful of hosts on one bridge. `names` are host names and namespaces alike."""

    names: tuple[str, ...]
    subnet: str
    folder: Path

    def command(self, host: str, *words: str) -> list[str]:
        """The command line that runs `words` on one host."""
        script = 'hostname "$0"; exec "$@"'
        return [find_program("ip") or "ip", "netns", "exec", host, "unshare", "-u", "sh", "-c", script, host, *words]

    def mpirun(self, bin_folder: Path, num_ranks: int, *words: str) -> list[str]:
        """The command line that starts ranks over the hosts, round robin, with the mpirun of an environment.

        Run it with `environment(bin_folder)`.
        """
        mpirun = str(bin_folder / "mpirun")
        agent = str(self.folder / "agent")
        if is_open_mpi(bin_folder):
            slots = -(-num_ranks // len(self.names))
            hostfile = self.folder / "hostfile"
            hostfile.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
            options = ["--prefix", str(bin_folder.parent), "--hostfile", str(hostfile), "--map-by", "node"]
            options += ["--bind-to", "none", "--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", agent]
            options += ["--prtemca", "prte_if_include", self.subnet, "--mca", "btl_tcp_if_include", self.subnet]
            # The hosts share their cores, which Open MPI cannot know: without yielding it is a thousand times slower.
            options += ["--mca", "mpi_yield_when_idle", "1"]
        else:
            options = ["-launcher", "ssh", "-launcher-exec", agent, "-hosts", ",".join(self.names), "-ppn", "1"]
            options += ["-iface", "eth0"]
        return self.command(self.names[0], mpirun, *options, "-n", str(num_ranks), *words)

    def environment(self, bin_folder: Path) -> dict[str, str]:
        """The environment variables for `mpirun`."""
        if is_open_mpi(bin_folder):
            settings = {
                "OMPI_ALLOW_RUN_AS_ROOT": "1",
                "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                "OMPI_MCA_pml": "ob1",
                "OMPI_MCA_btl": "self,sm,tcp",
                "OMPI_MCA_osc": "^ucx",
            }
        else:
            # The hosts share /dev/shm, so MPICH's UCX would use shared memory between them.
            settings = {"UCX_TLS": "tcp,self"}
        return {**os.environ, **settings}

    def sent_bytes(self, host: str) -> int:
        """How many bytes a host has sent to the others."""
        return int(Path(f"/sys/class/net/{port_name(host)}/statistics/rx_bytes").read_text())

    def shape(self, rate: str | None) -> None:
        """Limit what each host sends, such as ``1gbit``; None lifts the limit."""
        for name in self.names:
            tc = [find_program("tc") or "tc", "-n", name, "qdisc"]
            subprocess.run([*tc, "del", "dev", "eth0", "root"], capture_output=True, check=False)  # there may be none
            if rate is not None:
                limits = ["tbf", "rate", rate, "burst", "128kb", "latency", "100ms"]
                run(*tc, "add", "dev", "eth0", "root", *limits)


def port_name(host: str) -> str:
    """The bridge's end of a host's cable."""
    return f"v{host}"


def is_open_mpi(bin_folder: Path) -> bool:
    """Whether an environment's mpirun is Open MPI's (else MPICH's)."""
    return (bin_folder / "prterun").exists() or (bin_folder / "ompi_info").exists()


def run(*words: str) -> str:
    """Run a command that must succeed; its output."""
    command = [find_program(words[0]) or words[0], *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def find_program(name: str) -> str | None:
    """A program's path; tc lies in /usr/sbin, which need not be on PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def reason_to_skip() -> str | None:
    """Why there can be no namespaces here, and what to do about it; None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        ("unshare", "util-linux"),
        ("hostname", "hostname"),
    ):
        if find_program(program) is None:
            return f"no program {program!r}: apt-get install {package}"
    probe = f"probe{os.getpid()}"
    try:
        run("ip", "netns", "add", probe)
        run("ip", "netns", "del", probe)
        run("ip", "link", "add", probe, "type", "bridge")
        run("ip", "link", "del", probe)
    except RuntimeError as error:
        return f"this kernel or container refuses network namespaces: {error}"
    return None


@contextmanager
def network_hosts(num_hosts: int) -> Iterator[Hosts]:
    """Hosts that exist until the end of the block; what still runs on them then is killed.

    Raises:
        RuntimeError: the machine refused; the message holds the command and its error.
    """
    # By process, by set of this process, and by chance for what runs in another process namespace.
    tag = f"{os.getpid() & 0xFFFF:04x}{next(_SETS) & 0xFF:02x}{random.SystemRandom().randrange(256):02x}"
    names = tuple(f"lh{tag}n{number}" for number in range(1, num_hosts + 1))
    bridge = f"lb{tag}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lepton-hosts-")))
        agent = folder / "agent"
        agent.write_text(AGENT)
        agent.chmod(0o755)
        run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(run, "ip", "link", "del", bridge)
        prefix = free_prefix()
        run("ip", "addr", "add", f"{prefix}.254/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            add_host(stack, name, bridge, f"{prefix}.{number}/24")
            hosts_file = Path("/etc/netns") / name / "hosts"
            hosts_file.parent.mkdir(parents=True)
            stack.callback(shutil.rmtree, hosts_file.parent)
            lines = ["127.0.0.1 localhost", *(f"{prefix}.{n} {other}" for n, other in enumerate(names, start=1))]
            hosts_file.write_text("\n".join(lines) + "\n")
        yield Hosts(names, f"{prefix}.0/24", folder)


def free_prefix() -> str:
    """Three octets of a subnet that this machine has no address in, from the range kept for benchmarks (RFC 2544)."""
    used = run("ip", "-4", "-o", "addr")
    choices = [f"198.{second}.{third}" for second in (18, 19) for third in range(256)]
    return random.SystemRandom().choice([prefix for prefix in choices if f" {prefix}." not in used])


def add_host(stack: ExitStack, name: str, bridge: str, address: str) -> None:
    """One namespace with a cable to the bridge."""
    run("ip", "netns", "add", name)
    stack.callback(remove_host, name)
    run("ip", "link", "add", port_name(name), "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", port_name(name), "master", bridge, "up")
    run("ip", "-n", name, "addr", "add", address, "dev", "eth0")
    run("ip", "-n", name, "link", "set", "eth0", "up")
    run("ip", "-n", name, "link", "set", "lo", "up")


def remove_host(name: str) -> None:
    """Kill what still runs in a namespace, then remove it; its cable goes with it."""
    for pid in map(int, run("ip", "netns", "pids", name).split()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # gone in between
    run("ip", "netns", "del", name)
