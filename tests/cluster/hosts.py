"""Two hosts on one machine: network namespaces joined by a cable, each with its own name, /etc/hosts and sshd.

They share disks, processes' numbers and memory. Nothing outside the namespaces and a temporary folder is touched: no
user's SSH keys, no file in /etc. Needs root and iproute2; ssh needs openssh-server.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PREFIX = "ij"
_COUNT = itertools.count()
_ENTER = """
set -e
hostname "$1"; mount --bind "$2/hosts" /etc/hosts
if [ -e "$2/ssh_config" ]; then mount --bind "$2/ssh_config" /etc/ssh/ssh_config; fi
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
shift 2; exec "$@"
"""
_SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""
_SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
ListenAddress {address}
PidFile {folder}/{name}/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
"""
SSHD = "/usr/sbin/sshd"


def lacking(*programs: str) -> str | None:
    """Returns why this machine can't play two hosts with these programs; None if it can."""
    if os.geteuid() != 0:
        return "two hosts on one machine need root"
    missing = [name for name in ("ip", "nsenter", "unshare", *programs) if shutil.which(name) is None]
    if missing:
        return f"two hosts on one machine need {', '.join(missing)} (apt-get install iproute2 openssh-server pdsh)"
    refused = refusal()
    return f"this machine lets nobody make namespaces: {refused}" if refused else None


@functools.cache
def refusal() -> str | None:
    """Returns what the system says to what the hosts need, as containers may be denied it; None if it allows all."""
    inside = "hostname probe && mount -t tmpfs tmpfs /mnt && ip link add probe type veth peer name other"
    name = f"ijp{uuid.uuid4().hex[:8]}"
    within = ["unshare", "--net", "--uts", "--mount", "sh", "-c", inside]
    try:
        for command in (within, ["ip", "netns", "add", name], ["nsenter", f"--net=/run/netns/{name}", "true"]):
            tried = subprocess.run(command, capture_output=True, text=True)
            if tried.returncode:
                return tried.stderr.strip() or f"{command[0]} ends with {tried.returncode}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None


@dataclass(frozen=True)
class Host:
    """One of the two. A command starts there behind `prefix`."""

    name: str
    address: str
    namespace: str
    folder: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        entering = ("nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount", "bash", "-c")
        return (*entering, _ENTER, "enter", self.name, str(self.folder))

    def run(self, *command: str) -> str:
        """Returns what a command prints."""
        return subprocess.run([*self.prefix, *command], check=True, capture_output=True, text=True).stdout

    def processes(self) -> list[psutil.Process]:
        """Returns the processes that run there."""
        found = []
        for number in _numbers(self.namespace):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(number))
        return found

    def trainers(self, config: Path) -> list[psutil.Process]:
        """Returns the processes there that train with this configuration, without launchers and loaders' workers."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if str(config) in words and any(word.endswith("/pretrain.py") for word in words[1:3]):
                    found.append(process)
        return found


@dataclass(frozen=True)
class TwoHosts:
    """Hosts nodea and nodeb with a cable between them."""

    a: Host
    b: Host

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b))

    def cut(self) -> None:
        """Cuts the cable: no packet arrives, and nobody is told."""
        _ip("-n", self.a.namespace, "link", "set", "cable", "down")

    def join(self) -> None:
        """Puts the cable back."""
        _ip("-n", self.a.namespace, "link", "set", "cable", "up")


@contextlib.contextmanager
def two_hosts(folder: Path, *, own_name_is_loopback: bool = False, ssh: bool = False) -> Iterator[TwoHosts]:
    """Yields two hosts, and ends all that runs on them and removes them afterwards.

    With `own_name_is_loopback`, each has its own name as 127.0.1.1 in its /etc/hosts, as Debian's installer writes it.
    """
    _remove_left()
    number = next(_COUNT)
    names = [f"{_PREFIX}{os.getpid()}-{number}{letter}" for letter in "ab"]
    network = f"10.{100 + os.getpid() // 250 % 100}.{os.getpid() % 250}"
    hosts = [
        Host(f"node{letter}", f"{network}.{index}", name, folder / f"node{letter}")
        for index, (letter, name) in enumerate(zip("ab", names, strict=True), 1)
    ]
    servers: list[subprocess.Popen] = []
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.folder.mkdir(parents=True)
            lines = ["127.0.0.1 localhost"]
            for each in hosts:
                own = own_name_is_loopback and each is host
                lines.append(f"{'127.0.1.1' if own else each.address} {each.name}")
            (host.folder / "hosts").write_text("\n".join(lines) + "\n")
        first, second = (host.namespace for host in hosts)
        _ip("link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "cable")
            _ip("-n", host.namespace, "link", "set", "cable", "up")
        if ssh:
            servers += _start_ssh(folder, hosts)
        yield TwoHosts(*hosts)
    finally:
        for host in hosts:
            _remove(host.namespace)
        for server in servers:
            server.wait(10)


def _start_ssh(folder: Path, hosts: list[Host]) -> list[subprocess.Popen]:
    """Starts an sshd on each host, and lets root of each log in on both."""
    for key in ("key", "host_key"):
        making = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(making, check=True)
    servers = []
    for host in hosts:
        (host.folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        config = host.folder / "sshd_config"
        config.write_text(_SSHD_CONFIG.format(folder=folder, address=host.address, name=host.name))
        # sshd insists on the folder /run/sshd
        own_run = 'mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec "$@"'
        command = [*host.prefix, "bash", "-c", own_run, "sshd", SSHD, "-D", "-e", "-f", str(config)]
        servers.append(subprocess.Popen(command, stderr=(host.folder / "sshd.log").open("w")))
    for host, other in itertools.product(hosts, hosts):
        deadline = time.monotonic() + 10
        while subprocess.run([*host.prefix, "ssh", other.name, "true"], capture_output=True).returncode:
            assert time.monotonic() < deadline, (other.folder / "sshd.log").read_text()
            time.sleep(0.1)
    return servers


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _remove(namespace: str) -> None:
    """Ends what runs in a namespace, by number, and removes it with its end of the cable."""
    deadline = time.monotonic() + 10
    while numbers := _numbers(namespace):
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        assert time.monotonic() < deadline, numbers
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def _numbers(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(number) for number in listed.stdout.split()]


def _remove_left() -> None:
    """Removes the hosts of tests that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0] if line.strip() else ""
        number = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and number.isdigit() and not psutil.pid_exists(int(number)):
            _remove(name)
