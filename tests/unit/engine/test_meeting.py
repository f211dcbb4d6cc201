"""Processes that start again with the same store find one another, in whatever order and however late they come."""

from __future__ import annotations

import datetime
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, Store, TCPStore

from ijepa_scale.engine.meeting import fresh
from ijepa_scale.errors import ConfigError

SOON = datetime.timedelta(seconds=20)


def start(connect: Callable[[], Store], size: int, delays: list[float]) -> list[str]:
    """Returns what each process reads of process 0's, which each attempt writes under the same name."""
    told = str(random.random())

    def process(rank: int) -> str:
        time.sleep(delays[rank])
        found = fresh(connect(), rank, size, SOON)
        if rank == 0:
            found.set("address", told)
        return found.get("address").decode()

    with ThreadPoolExecutor(size) as pool:
        read = list(pool.map(process, range(size)))
    assert read == [told] * size
    return read


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_start_reads_its_own_addresses(size: int) -> None:
    store, draws = HashStore(), random.Random(size)
    read = [start(lambda: store, size, [draws.uniform(0, 0.1) for _ in range(size)])[0] for _ in range(10)]
    assert len(set(read)) == 10


def test_a_start_after_one_that_was_killed_half_way() -> None:
    """Of the earlier ones only some processes came, and nobody answered, or not everybody heard."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect() -> Store:
        return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)

    for ranks in ([1], [2], [1, 2], [0]):
        for rank in ranks:
            threading.Thread(target=_until_killed, args=(connect(), rank), daemon=True).start()
        time.sleep(0.1)
        start(connect, 3, [0.1, 0.0, 0.05])


def _until_killed(store: Store, rank: int) -> None:
    with pytest.raises(ConfigError):
        fresh(store, rank, 3, datetime.timedelta(seconds=0.05))


def test_who_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="in vain for processes 1, 2 to start"):
        fresh(HashStore(), 0, 3, datetime.timedelta(seconds=0.05))
    with pytest.raises(ConfigError, match="in vain for process 0 to start"):
        fresh(HashStore(), 1, 3, datetime.timedelta(seconds=0.05))
