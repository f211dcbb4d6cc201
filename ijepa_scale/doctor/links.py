"""Measures the links between the processes of a run, and how far the clocks of their hosts differ.

Every process calls `Links.measure`. Process 0 waits for all between measurements, and names those that don't come.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_scale.doctor.finding import Finding, size_text
from ijepa_scale.engine.world import World
from ijepa_scale.planning.devices import device_with_title

WAIT_S = 30.0  # for another process, once both measure
BUDGET_S = 30.0  # of all pairs together
MOST_PAIRS = 28  # all pairs of 8 processes
MOST_SKEW_S = 1.0  # between hosts: files' times and logs are then in another order than what happened
SLOW_NETWORK = 100e6  # bytes per second between hosts: less than gigabit Ethernet
LEAST_OF_LINK = 0.3  # of the data sheet's bandwidth, that a large all-reduce inside a host must reach
OUTLIER = 1 / 3  # of the median: what a healthy pair doesn't reach on a busy machine either
_PINGS, _PAIR_BYTES, _MORE_S = 20, (1 << 20, 16 << 20), 0.2
_REDUCED = {
    "cpu": (4_000, 256_000, 4_000_000, 32_000_000),
    "cuda": (256_000, 4_000_000, 64_000_000, 256_000_000),
}  # bytes
_REDUCE_S = 1.0  # the last size is the one that takes longer
_REPEATS = 5

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The link between two processes."""

    first: int
    second: int
    between_hosts: bool
    latency_s: float  # of 8 bytes in one direction
    bytes_per_s: float  # in one direction

    @property
    def name(self) -> str:
        """The processes."""
        return f"{self.first}-{self.second}"


def chosen_pairs(hosts: list[str], most: int = MOST_PAIRS) -> list[tuple[int, int]]:
    """Returns the pairs of processes to measure, `hosts` being the host of each: all if that is at most `most` pairs.

    Otherwise those that are neighbours in the ring of all processes, and the first processes of hosts in all pairs;
    never more than `most`, evenly chosen.
    """
    count = len(hosts)
    pairs = list(itertools.combinations(range(count), 2))
    if len(pairs) <= most:
        return pairs
    firsts = [rank for rank in range(count) if hosts[rank] not in hosts[:rank]]
    ring = [(rank, rank + 1) for rank in range(count - 1)] + [(0, count - 1)]
    wanted = sorted({*ring, *itertools.combinations(firsts, 2)})
    return [wanted[index * len(wanted) // most] for index in range(most)] if len(wanted) > most else wanted


def hosts_of(names: list[tuple[str, int]]) -> list[str]:
    """Returns a name for the host of each process, from (host name, local rank): hosts may have equal names."""
    found = []
    for index, (host, local) in enumerate(names):
        copies = names[:index].count((host, local))
        found.append(host if not copies else f"{host} ({copies + 1})")
    return found


class Links:
    """The measurements of one process's links. Communicates; `stage` says what it is doing."""

    def __init__(self, world: World, *, host: str, clock: Clock = time.time, wait_s: float = WAIT_S) -> None:
        timeout = datetime.timedelta(seconds=wait_s)
        self._device, self._clock, self._timeout = world.device, clock, timeout
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._world = replace(world, device=torch.device("cpu"), group=self._group)
        self.stage = "naming hosts"
        self._hosts = hosts_of(cast(list[tuple[str, int]], self._world.gather_objects((host, world.local_rank))))

    def measure(self) -> list[Finding]:
        """Returns the findings, on process 0; nothing on the others.

        Raises:
            RuntimeError: a process didn't answer, or a backend failed.
        """
        found = [*self._clocks(), *self._pairs()]
        devices = [torch.device("cpu"), self._device] if self._device.type == "cuda" else [torch.device("cpu")]
        found += [finding for device in devices for finding in self._all_reduce(device)]
        return found if self._world.is_main else []

    def _together(self, stage: str) -> None:
        """Waits for all processes; process 0 names those that don't come."""
        self.stage = stage
        dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=self._world.is_main)

    def _clocks(self) -> Iterator[Finding]:
        """Yields how far the clock of each host is from that of process 0's, by the fastest of several answers.

        Source: RFC 5905, section 8: the offset of the shortest round trip.
        """
        firsts = [rank for rank, host in enumerate(self._hosts) if host not in self._hosts[:rank]]
        told = torch.empty(1, dtype=torch.float64)
        for rank in firsts[1:]:
            self._together(f"comparing clocks with process {rank}")
            if self._world.rank not in (0, rank):
                continue
            tries = []
            for _ in range(_PINGS):
                if self._world.rank == 0:
                    begin = self._clock()
                    dist.send(told, rank, group=self._group)
                    dist.recv(told, rank, group=self._group)
                    end = self._clock()
                    tries.append((end - begin, float(told) - (begin + end) / 2))
                else:
                    dist.recv(told, 0, group=self._group)
                    told.fill_(self._clock())
                    dist.send(told, 0, group=self._group)
            if tries:
                yield _skew(self._hosts[rank], *min(tries))

    def _pairs(self) -> Iterator[Finding]:
        """Yields the latency and the bandwidth of pairs over gloo, one pair at a time, and on GPUs over NCCL."""
        wanted = chosen_pairs(self._hosts)
        backends = [("gloo", torch.device("cpu"), self._group)]
        if self._device.type == "cuda":
            backends.append(("NCCL", self._device, None))
        for name, device, group in backends:
            mine, begin = [], time.monotonic()
            for first, second in wanted:
                self._together(f"measuring processes {first} and {second} over {name}")
                if not self._world.broadcast_object(time.monotonic() - begin < BUDGET_S):
                    break
                if self._world.rank in (first, second):
                    mine.append(self._pair(first, second, device, group))
            gathered = self._world.gather_objects([each for each in mine if each is not None])
            pairs = [pair for part in cast(list[list[Pair]], gathered) for pair in part]
            if pairs:
                yield from pair_findings(name, pairs, len(self._hosts))

    def _pair(self, first: int, second: int, device: torch.device, group: Any) -> Pair | None:
        """Returns what the first of two processes measures; None on the second."""
        leads, other = self._world.rank == first, second if self._world.rank == first else first
        small = torch.zeros(1, dtype=torch.float64, device=device)

        def swap(tensor: Tensor) -> float:
            """Sends a tensor from the first to the second, which answers with a number; returns the seconds."""
            begin = time.perf_counter()
            (dist.send if leads else dist.recv)(tensor, other, group=group)
            (dist.recv if leads else dist.send)(small, other, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin

        swap(small)  # connects
        latency = min(swap(small) for _ in range(_PINGS)) / 2
        speed = 0.0
        for size in _PAIR_BYTES:
            big = torch.zeros(size, dtype=torch.uint8, device=device)
            swap(big)
            spent = min(swap(big) for _ in range(2))
            speed = size / max(1e-9, spent - latency)
            again = torch.tensor([float(spent < _MORE_S)], dtype=torch.float64, device=device)
            (dist.send if leads else dist.recv)(again, other, group=group)
            if not again.item():
                break
        if not leads:
            return None
        apart = self._hosts[first] != self._hosts[second]
        return Pair(first=first, second=second, between_hosts=apart, latency_s=latency, bytes_per_s=speed)

    def _all_reduce(self, device: torch.device) -> Iterator[Finding]:
        """Yields the bus bandwidth by size: what each process sends per second in a ring.

        Source: NVIDIA's nccl-tests, doc/PERFORMANCE.md: 2 (n - 1) / n of the bytes.
        """
        name, group = ("gloo", self._group) if device.type == "cpu" else ("NCCL", None)
        size, speeds = self._world.size, {}
        for count in _REDUCED[device.type]:
            self._together(f"reducing {size_text(count)} over {name}")
            tensor, spent = torch.zeros(count // 4, device=device), []
            for _ in range(_REPEATS + 1):
                begin = time.perf_counter()
                dist.all_reduce(tensor, group=group)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent.append(time.perf_counter() - begin)
            seconds = self._world.broadcast_object(statistics.median(spent[1:]))
            assert isinstance(seconds, float)
            speeds[count] = 2 * (size - 1) / size * count / seconds
            if seconds > _REDUCE_S:
                break
        kind = device_with_title(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        link = kind.link_bandwidth if kind is not None and len(set(self._hosts)) == 1 else None
        yield reduce_finding(name, speeds, size, link)


def reduce_finding(backend: str, speeds: dict[int, float], processes: int, link: float | None) -> Finding:
    """Returns the line about the bus bandwidth by size; wrong if the best is far below the GPUs' `link`, if known."""
    best = max(speeds.values())
    wrong = link is not None and best < LEAST_OF_LINK * link
    of_link = f"; the GPUs' links have {size_text(link)}/s" if link is not None else ""
    return Finding(
        check=f"all-reduce, {backend}",
        found=", ".join(f"{size_text(count)} at {size_text(speed)}/s" for count, speed in speeds.items())
        + f" on the bus of {processes} processes{of_link}",
        verdict="wrong" if wrong else "ok",
        remedy="see whether the links are up and used: nvidia-smi nvlink --status, nvidia-smi topo -m, NCCL_DEBUG=INFO"
        if wrong
        else "",
        values={"bus_bytes_per_s": {str(count): speed for count, speed in speeds.items()}},
    )


def _skew(host: str, round_trip: float, offset: float) -> Finding:
    wrong = abs(offset) > MOST_SKEW_S
    return Finding(
        check="clocks",
        found=f"{host} is {abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} process 0's host, "
        f"within {round_trip / 2:.2g} s",
        verdict="wrong" if wrong else "ok",
        remedy="let chrony or ntpd set the clocks of all hosts" if wrong else "",
        values={"host": host, "offset_s": offset, "round_trip_s": round_trip},
    )


def pair_findings(backend: str, pairs: list[Pair], processes: int) -> Iterator[Finding]:
    """Yields a line about the pairs of each kind, inside hosts and between them, with the slow ones by name."""
    total = processes * (processes - 1) // 2
    for between in (False, True):
        those = [pair for pair in pairs if pair.between_hosts is between]
        if not those:
            continue
        speeds = [pair.bytes_per_s for pair in those]
        middle, latency = statistics.median(speeds), statistics.median(pair.latency_s for pair in those)
        slow = [pair for pair in those if len(those) > 2 and pair.bytes_per_s < OUTLIER * middle]
        problems, remedy = [], []
        if slow:
            problems.append(
                "far slower than the others: "
                + ", ".join(f"{pair.name} at {size_text(pair.bytes_per_s)}/s" for pair in slow[:4])
                + (f" and {len(slow) - 4} more" if len(slow) > 4 else "")
            )
            remedy.append("check the host, cable or slot that these share, or leave the host out")
        if between and backend == "gloo" and middle < SLOW_NETWORK:
            problems.append("slower than gigabit Ethernet")
            remedy.append("name the fast interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; `ip addr` lists them")
        yield Finding(
            check=f"pairs {'between hosts' if between else 'in a host'}, {backend}",
            found=f"{len(those)} of {total} pairs: {size_text(middle)}/s ({size_text(min(speeds))}/s to "
            f"{size_text(max(speeds))}/s), latency {1e6 * latency:.0f} us" + "".join(f"; {what}" for what in problems),
            verdict="wrong" if problems else "ok",
            remedy="; ".join(remedy),
            values={
                "pairs": [
                    {"processes": [p.first, p.second], "bytes_per_s": p.bytes_per_s, "latency_s": p.latency_s}
                    for p in those
                ]
            },
        )


__all__ = ["Links", "Pair", "chosen_pairs", "hosts_of", "pair_findings", "reduce_finding"]
