"""Reads how much host memory this program may take, from Linux's system files. Must not know what it is for."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

# Files of a control group's limit and use, and the prefix of its figures in memory.stat. Sources: the Linux kernel's
# documentation, admin-guide/cgroup-v2 ("Memory Interface Files") and admin-guide/cgroup-v1/memory.
_VERSION_2 = ("memory.max", "memory.current", "")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def host_bytes(root: Path = Path("/")) -> int:
    """Returns the bytes of host memory that this program may take, within the limits of Linux, cgroup and ulimit -v."""
    lines = system_file(root / "proc/meminfo").splitlines()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    found += _control_groups(root)
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        found.append(address_space)
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_groups(root: Path) -> Iterator[int]:
    """Yields the bytes left in this process's control group and in each group around it that has a limit.

    Use counts the page cache, which the kernel gives back when it is needed, so it isn't subtracted.
    """
    groups = {("", _VERSION_2, Path("/")), ("memory", _VERSION_1, Path("/"))}  # what a container sees as its root
    for line in system_file(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        kind = ("", _VERSION_2) if not controllers else ("memory", _VERSION_1)
        if not controllers or "memory" in controllers.split(","):
            groups |= {(*kind, path) for path in (Path(name), *Path(name).parents)}
    for folder, (limit, use, prefix), path in groups:
        place = root / "sys/fs/cgroup" / folder / path.relative_to("/")
        most, taken = system_file(place / limit).strip(), system_file(place / use).strip()
        if most.isdigit() and taken.isdigit():
            lines = [line.split() for line in system_file(place / "memory.stat").splitlines()]
            cache = [int(size) for name, size in lines if name in (f"{prefix}active_file", f"{prefix}inactive_file")]
            yield max(0, int(most) - max(0, int(taken) - sum(cache)))


def system_file(path: Path) -> str:
    """Returns the text of one of Linux's system files; empty if it doesn't exist."""
    try:
        return path.read_text()
    except OSError:
        return ""
