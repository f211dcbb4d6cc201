"""Lets the processes of a start find one another in a store that may hold what an earlier start left.

torchrun restarts processes with the same store (torch 2.11): a process that comes early would read what those have said
that have ended. So all agree on a prefix that no earlier start has used.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NoReturn

from torch.distributed import PrefixStore, Store

from ijepa_scale import environment
from ijepa_scale.engine.connect import TELL_S
from ijepa_scale.errors import ConfigError

logger = logging.getLogger(__name__)

_LOOK_S = (0.01, 0.5)  # between two looks, first and at most
_AGAIN_S = 1.0  # between looks for a second process of the same rank
_GRACE_S = 10.0  # that process 0 has to say who is missing, after the time is over
LINGER_S = 3.0  # that process 0 serves the store to the others after an error
_ENDED = "ended"  # counts the processes that know that the run ends
_SHOWN = 8  # processes that a message names


@dataclass(frozen=True, kw_only=True)
class Member:
    """A process of the run, as the others know it."""

    rank: int
    size: int  # of the run, as this process was started
    host: str
    pid: int
    address: str | None = None  # of its host, on the way to process 0
    gpu: str | None = None  # its number in all the world; None without one
    network: str = ""  # equal where processes have the same network interfaces

    @classmethod
    def own(cls, rank: int, size: int, address: str | None = None, gpu: str | None = None) -> Member:
        """Returns this process."""
        host, network = socket.gethostname(), environment.namespace("net")
        return cls(rank=rank, size=size, host=host, pid=os.getpid(), address=address, gpu=gpu, network=network)

    def __str__(self) -> str:
        return f"process {self.rank} ({self.pid} on {self.host})"


class _Clock:
    """Waits in growing pauses until a deadline of `time.monotonic()`."""

    def __init__(self, deadline: float) -> None:
        self.began = self.told = time.monotonic()
        self.deadline = deadline
        self._pause_s = _LOOK_S[0]

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait(self, missing: Iterable[int] = (), size: int = 0) -> None:
        """Pauses, and warns every 10 s of the processes that are `missing` of `size`."""
        if missing and time.monotonic() - self.told > TELL_S:
            self.told = time.monotonic()
            logger.warning("waiting for %s of %d, %.0f s", _named(missing), size, self.seconds)
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LOOK_S[1])


def meet(store: Store, own: Member, deadline: float) -> tuple[Store, list[Member]]:
    """Returns the part of the store that only these processes use, each of which must call it, and who they are.

    Each process but the first says hello under a name that it has made up, which nobody has answered before. The first
    answers with the prefix, and goes on once all have said that they know it, since a hello may be an earlier start's.

    Raises:
        ConfigError: a process doesn't come until the `deadline`, a time of `time.monotonic()`, two come as the same
            one, or they were told different numbers of processes. All processes raise it, and one tells it.
    """
    return _gather(store, own, _Clock(deadline)) if own.rank == 0 else _join(store, own, _Clock(deadline + _GRACE_S))


def _gather(store: Store, own: Member, clock: _Clock) -> tuple[Store, list[Member]]:
    """Process 0's part."""
    prefix = uuid.uuid4().hex
    part = PrefixStore(prefix, store)
    answered: dict[int, str] = {}
    missing = set(range(1, own.size))
    again = 0.0
    while missing:
        look_again = time.monotonic() - again > _AGAIN_S
        again = time.monotonic() if look_again else again
        for other in range(1, own.size) if look_again else sorted(missing):
            if store.check([f"hello/{other}"]):
                said = store.get(f"hello/{other}").decode()
                if said != answered.get(other):
                    answered[other] = said
                    store.set(f"prefix/{said}", prefix)
        missing = {other for other in missing if not part.check([f"known/{other}"])}
        if part.check(["refused"]):
            try:
                _check_refused(part)
            finally:
                linger(part, own, own.size - len(missing))
        if missing:
            if clock.is_over:
                count = f"{len(missing)} of {own.size} processes haven't come within {clock.seconds:.0f} s"
                try:
                    refuse(
                        part,
                        f"{count}: {_named(missing)}; read their output and their launcher's, and check that "
                        f"they were given the address and port of {own.host}",
                    )
                finally:
                    linger(part, own, own.size - len(missing))
            clock.wait(missing, own.size)
    members = [own, *(Member(**json.loads(part.get(f"who/{other}"))) for other in range(1, own.size))]
    part.set("members", json.dumps([asdict(member) for member in members]))
    return part, members


def _join(store: Store, own: Member, clock: _Clock) -> tuple[Store, list[Member]]:
    """The part of the others."""
    mine = uuid.uuid4().hex
    hello = f"hello/{own.rank}"
    store.set(hello, mine)
    while not store.check([f"prefix/{mine}"]):
        if store.get(hello).decode() != mine:  # another process came as this one: let process 0 see both
            store.set(hello, mine)
        if clock.is_over:
            raise ConfigError(
                f"{own} has waited {clock.seconds:.0f} s for process 0, which didn't start; read its output, "
                f"and check whether another process came as process {own.rank}"
            )
        clock.wait()
    part = PrefixStore(store.get(f"prefix/{mine}").decode(), store)
    part.set(f"who/{own.rank}", json.dumps(asdict(own)))
    if part.add(f"known/{own.rank}", 1) > 1:
        refuse(part, f"two processes came as process {own.rank}, one of them is {own.pid} on {own.host}; check RANK")
    members = json.loads(await_word(part, "members", clock.deadline, own))
    return part, [Member(**member) for member in members]


def await_word(part: Store, key: str, deadline: float, own: Member, who: str = "process 0") -> bytes:
    """Returns what a process says under a key.

    Raises:
        ConfigError: a process has refused the start, and tells why; or nothing is said until the deadline.
    """
    clock = _Clock(deadline)
    while not part.check([key]):
        _check_refused(part)
        if clock.is_over:
            raise ConfigError(
                f"{own} has waited for {who} for {clock.seconds:.0f} s without an answer; read its output"
            )
        clock.wait()
    return part.get(key)


def ends(part: Store) -> None:
    """Says that this process ends with an error."""
    part.add(_ENDED, 1)


def linger(part: Store, own: Member, expected: int) -> None:
    """Lets process 0, which may serve the store, wait a little until so many processes know that the run ends."""
    deadline = time.monotonic() + LINGER_S
    while own.rank == 0 and part.add(_ENDED, 0) < expected and time.monotonic() < deadline:
        time.sleep(_LOOK_S[0])


def _check_refused(part: Store) -> None:
    if part.check(["refused"]):
        part.add(_ENDED, 1)
        error = ConfigError(*part.get("refused").decode().split("\n"))
        error.is_told = True
        raise error


def refuse(part: Store, *problems: str) -> NoReturn:
    """Ends the start on all processes, of which this one says why."""
    part.set("refused", "\n".join(problems))
    part.add(_ENDED, 1)
    error = ConfigError(*problems)
    error.is_told = False
    raise error


def _named(ranks: Iterable[int]) -> str:
    """Returns processes in words, such as 'processes 1, 4-7'."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    more = f" and {len(words) - _SHOWN} more groups" if len(words) > _SHOWN else ""
    several = len(spans) > 1 or spans[0][0] != spans[0][1]
    return f"process{'es' if several else ''} {', '.join(words[:_SHOWN])}{more}"
