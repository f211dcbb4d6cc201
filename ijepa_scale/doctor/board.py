"""Where processes leave their findings for process 0, and get its verdict: a store, which needs no collective.

So process 0 has the findings of all others when one of them hangs, and says which one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore

from ijepa_scale.doctor.finding import Finding
from ijepa_scale.engine.world import World
from ijepa_scale.no_answer import within

T = TypeVar("T")

_LOOK_S, _LEAVE_S = 0.05, 5.0
_ANSWER_S = 10.0  # that the store may take, on top of what it is waited for


class Board:
    """The findings of all processes.

    Every method raises `NoAnswer` if the store, which process 0 or the launcher serves, doesn't answer. What is asked
    of it afterwards waits for the same answer, so nothing but an end of the process is left.
    """

    def __init__(self, world: World) -> None:
        self._rank, self._size = world.rank, world.size
        # a connection of its own, since a collective that hangs may hold the other
        self._store: Any = PrefixStore("doctor", dist.HashStore() if world.store is None else world.store.clone())

    def post(self, findings: list[Finding], *, hung: bool) -> None:
        """Leaves this process's findings, and whether something in it waits for ever."""
        content = {"findings": [asdict(each) for each in findings], "hung": hung}
        self.tell(f"findings/{self._rank}", json.dumps(content))

    def collect(self, seconds: float) -> tuple[list[Finding], list[int], bool]:
        """Returns the findings of all other processes, those that leave none in time, and whether one hangs."""
        missing = self._await("findings", seconds)
        told = [f"findings/{rank}" for rank in range(1, self._size) if rank not in missing]
        found = [json.loads(each) for each in self._asked(lambda: [self._store.get(key) for key in told])]
        findings = [Finding(**each) for content in found for each in content["findings"]]
        return findings, missing, bool(missing) or any(content["hung"] for content in found)

    def assemble(self, seconds: float) -> list[int]:
        """Returns the processes that haven't called this in time, the same on all that have."""
        if self._rank:
            self.tell(f"here/{self._rank}", "")
            told = self.hear("missing", 2 * seconds)
            return [0] if told is None else list(json.loads(told))
        missing = self._await("here", seconds)
        self.tell("missing", json.dumps(missing))
        return missing

    def tell(self, name: str, value: str) -> None:
        """Lets all other processes know something."""
        self._asked(lambda: self._store.set(name, value))

    def tell_last(self, name: str, value: str, absent: list[int]) -> None:
        """Does the same, and waits until those that aren't `absent` have heard it: the store ends with process 0."""
        self.tell(name, value)
        self._await(f"heard/{name}", _LEAVE_S, absent)

    def hear(self, name: str, seconds: float) -> str | None:
        """Returns what process 0 tells; None if it doesn't in time.

        Raises:
            RuntimeError: process 0 has ended.
        """
        return self._asked(partial(self._hear, name, seconds), seconds)

    def _hear(self, name: str, seconds: float) -> str | None:
        deadline = time.monotonic() + seconds
        while not self._store.check([name]):
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)
        value = str(self._store.get(name).decode())
        self._store.set(f"heard/{name}/{self._rank}", "")
        return value

    def _await(self, what: str, seconds: float, absent: list[int] | None = None) -> list[int]:
        """Returns the processes, without those that are absent, that leave no such note in time."""
        others = set(range(1, self._size)) - set(absent or ())
        return self._asked(partial(self._missing, what, seconds, others), seconds)

    def _missing(self, what: str, seconds: float, others: set[int]) -> list[int]:
        missing, deadline = others, time.monotonic() + seconds
        while True:
            missing = {rank for rank in missing if not self._store.check([f"{what}/{rank}"])}
            if not missing or time.monotonic() > deadline:
                return sorted(missing)
            time.sleep(_LOOK_S)

    def _asked(self, work: Callable[[], T], seconds: float = 0.0) -> T:
        """Returns the result of calls on the store, which has no limit of its own for some (torch 2.11)."""
        return within(seconds + _ANSWER_S, work)


__all__ = ["Board"]
