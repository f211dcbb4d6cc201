"""A Slurm of two nodes on this machine: two network namespaces with a munged, a slurmctld and two slurmd of their own.

Needs root and Debian's packages slurm-wlm, munge and iproute2. Nothing outside the namespaces and `folder` is touched,
and all processes in the namespaces are killed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import lacking

NODES = ("slurma", "slurmb")
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
ADDRESSES = ("10.46.0.1", "10.46.0.2")
CONF = """
ClusterName=test
SlurmctldHost={nodes[0]}({addresses[0]})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldPort=46817
SlurmdPort=46818
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
JobRequeue=0
MinJobAge=3000
SchedulerParameters=requeue_delay=1,bf_interval=5,batch_sched_delay=1,sched_interval=5
SchedulerType=sched/builtin
SlurmdTimeout=30
{lines}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """Returns why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "a Slurm on one machine needs root"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed; apt-get install slurm-wlm munge iproute2"
    return lacking()


@dataclass(frozen=True)
class Slurm:
    """A running Slurm. Its files are in `folder`."""

    folder: Path
    spaces: tuple[str, str]  # network namespaces, one a node

    def command(self, node: int, *words: str) -> list[str]:
        """Returns the command that runs `words` on a node, with the node's network and host name."""
        inside = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.spaces[node]}", "unshare", "--uts", "--mount"]
        return [*enter, "bash", "-c", inside, "on", NODES[node], str(self.folder / "hosts"), *words]

    def environment(self) -> dict[str, str]:
        """Returns what Slurm's commands need on top of the environment."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str, node: int = 0) -> str:
        """Runs a command of Slurm's, and returns its output."""
        found = subprocess.run(
            self.command(node, *words),
            env={**os.environ, **self.environment()},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert found.returncode == 0, f"{words}: {found.stderr or found.stdout}"
        return found.stdout

    def job(self, number: str) -> dict[str, str]:
        """Returns the fields of `scontrol show job`."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def start_node(self, node: int) -> None:
        """Starts a node's slurmd."""
        self.run("slurmd", "-f", self.environment()["SLURM_CONF"], "-N", NODES[node], node=node)

    def lose_node(self, node: int, *, spared: str = "slurmctld") -> None:
        """Kills all that runs on a node, but for the controller."""
        for process in self.processes(node):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if Path(f"/proc/{process}/comm").read_text().strip() != spared:
                    os.kill(process, 9)

    def processes(self, node: int) -> list[int]:
        """Returns the numbers of all processes on a node."""
        found = subprocess.run(["ip", "netns", "pids", self.spaces[node]], capture_output=True, text=True, check=True)
        return [int(word) for word in found.stdout.split()]

    def wait(self, number: str, *states: str, timeout: float = 120) -> dict[str, str]:
        """Waits until a job is in one of the states, lets a requeued one start at once, and returns its fields."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, job
            if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                time.sleep(3)  # else Slurm starts it with the credential that it has just revoked
                self.run("scontrol", "update", f"jobid={number}", "StartTime=now")
            time.sleep(0.3)
        return job


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Slurm]:
    """Yields a Slurm whose two nodes are idle, and removes it at the end."""
    name = uuid.uuid4().hex[:8]
    slurm = Slurm(folder, (f"ijs{name}a", f"ijs{name}b"))
    munged: subprocess.Popen | None = None
    try:
        _join(slurm.spaces)
        _write(folder)
        munged = _munged(folder)
        slurm.run("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in range(2):
            slurm.start_node(node)
        deadline = time.monotonic() + 30
        while slurm.run("sinfo", "--noheader", "--format=%T %D").split() != ["idle", "2"]:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.2)
        yield slurm
    finally:
        for node, space in enumerate(slurm.spaces):
            if Path(f"/run/netns/{space}").exists():
                slurm.lose_node(node, spared="")
                subprocess.run(["ip", "netns", "delete", space], check=False)
        if munged is not None:
            munged.kill()
            munged.wait()


def _join(spaces: tuple[str, str]) -> None:
    """Makes two namespaces with a cable between them."""
    lines = [f"netns add {space}" for space in spaces]
    lines.append(f"link add cable netns {spaces[0]} type veth peer name cable netns {spaces[1]}")
    for space, address in zip(spaces, ADDRESSES, strict=True):
        lines += [f"-n {space} link set lo up", f"-n {space} addr add {address}/24 dev cable"]
        lines.append(f"-n {space} link set cable up")
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def _write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for inner in ("state", "spool.slurma", "spool.slurmb"):
        (folder / inner).mkdir()
    names = [f"{address} {node}\n" for node, address in zip(NODES, ADDRESSES, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
    lines = "\n".join(
        f"NodeName={node} NodeAddr={address} NodeHostname={node} CPUs=2 RealMemory=4000 State=UNKNOWN"
        for node, address in zip(NODES, ADDRESSES, strict=True)
    )
    text = CONF.format(folder=folder, nodes=NODES, addresses=ADDRESSES, lines=lines)
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)


def _munged(folder: Path) -> subprocess.Popen:
    parents = [folder, *folder.parents]
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    flags = [f"--{flag}={folder / name}" for flag, name in {**names, "seed-file": "munged.seed"}.items()]
    modes = {parent: parent.stat().st_mode for parent in parents}
    for parent in parents[:3]:
        if not modes[parent] & 0o001:
            parent.chmod(modes[parent] & 0o7777 | 0o111)  # munged wants a socket that all can reach
    found = subprocess.Popen(["munged", "--foreground", "--force", *flags], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not (folder / "munge.socket").exists():
        assert found.poll() is None and time.monotonic() < deadline, (folder / "munged.log").read_text()
        time.sleep(0.05)
    return found
