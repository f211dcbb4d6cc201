"""Lets the processes of a start find one another in a store that may hold what an earlier start left.

torchrun restarts processes with the same store (torch 2.11): a process that comes early would read the addresses of
those that have ended, and fail to connect, or wait for ever. So all agree on a prefix that no earlier start has used.
"""

from __future__ import annotations

import datetime
import time
import uuid

from torch.distributed import PrefixStore, Store

from ijepa_scale.errors import ConfigError

_LOOK_S = 0.01


def fresh(store: Store, rank: int, size: int, timeout: datetime.timedelta) -> Store:
    """Returns the part of a store that only these processes use, each of which must call it.

    Each process but the first says hello under a name that it has made up, which nobody has answered before. The first
    answers with the prefix, and goes on once all have said that they know it, since a hello may be an earlier start's.

    Raises:
        ConfigError: a process doesn't come in time.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"hello/{rank}", mine)
        _wait(store, f"prefix/{mine}", deadline, "process 0")
        prefix = store.get(f"prefix/{mine}").decode()
        store.set(f"known/{prefix}/{rank}", "")
        return PrefixStore(prefix, store)
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"prefix/{store.get(f'hello/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"known/{mine}/{other}"])}
        if missing:
            _pause(deadline, f"processes {', '.join(map(str, sorted(missing)[:8]))}")
    return PrefixStore(mine, store)


def _wait(store: Store, key: str, deadline: float, who: str) -> None:
    while not store.check([key]):
        _pause(deadline, who)


def _pause(deadline: float, who: str) -> None:
    if time.monotonic() > deadline:
        raise ConfigError(f"waited in vain for {who} to start; see what the launcher and those processes have printed")
    time.sleep(_LOOK_S)
