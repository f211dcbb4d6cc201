"""Processes that start again with the same store find one another, in whatever order and however late they come."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, Store, TCPStore

from ijepa_scale.engine import meeting
from ijepa_scale.engine.meeting import Member, meet
from ijepa_scale.errors import ConfigError


def come(store: Store, rank: int, size: int, seconds: float = 20.0) -> tuple[Store, list[Member]]:
    return meet(store, Member.own(rank, size), time.monotonic() + seconds)


def start(connect: Callable[[], Store], size: int, delays: list[float]) -> list[str]:
    """Returns what each process reads of process 0's, which each attempt writes under the same name."""
    told = uuid.uuid4().hex  # not of random, whose state other tests set back

    def process(rank: int) -> str:
        time.sleep(delays[rank])
        found, members = come(connect(), rank, size)
        assert [member.rank for member in members] == list(range(size))
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


def test_a_start_after_one_that_was_killed_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the earlier ones only some processes came, and nobody answered, or not everybody heard."""
    monkeypatch.setattr(meeting, "_GRACE_S", 0.0)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect() -> Store:
        return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)

    for ranks in ([1], [2], [1, 2], [0]):
        for rank in ranks:
            threading.Thread(target=until_killed, args=(connect(), rank), daemon=True).start()
        time.sleep(0.1)
        start(connect, 3, [0.1, 0.0, 0.05])


def until_killed(store: Store, rank: int) -> None:
    with pytest.raises(ConfigError):
        come(store, rank, 3, 0.05)


def test_who_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(meeting, "_GRACE_S", 0.0)
    monkeypatch.setattr(meeting, "TELL_S", 0.01)
    with pytest.raises(ConfigError, match="7 of 8 processes haven't come within 0 s: processes 1-7; read their output"):
        come(HashStore(), 0, 8, 0.1)
    assert "waiting for processes 1-7 of 8" in caplog.text
    with pytest.raises(ConfigError, match=r"process 1 \(\d+ on .*\) has waited 0 s for process 0, which didn't start"):
        come(HashStore(), 1, 3, 0.05)


def failed(store: Store, *places: tuple[int, int, float]) -> list[ConfigError]:
    """Returns the errors of processes (rank, size, seconds until it gives up)."""

    def process(place: tuple[int, int, float]) -> ConfigError:
        with pytest.raises(ConfigError) as error:
            come(store, *place)
        return error.value

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(process, places))


def test_those_that_came_hear_who_is_missing_and_one_tells_it() -> None:
    errors = failed(HashStore(), (0, 4, 1.0), (1, 4, 20.0), (3, 4, 20.0))
    assert {str(error) for error in errors} == {str(errors[0])} and "process 2; read their output" in str(errors[0])
    assert [error.is_told for error in errors] == [False, True, True]


def test_two_processes_of_the_same_rank_are_refused() -> None:
    errors = failed(HashStore(), (0, 3, 20.0), (1, 3, 20.0), (1, 3, 20.0))
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "two processes came as process 1, one of them is" in str(errors[0])
    assert sum(not error.is_told for error in errors) == 1


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([3], "process 3"), ([1, 2], "processes 1-2"), ([7, 1, 2, 4], "processes 1-2, 4, 7"),
     (range(0, 40, 2), "processes 0, 2, 4, 6, 8, 10, 12, 14 and 12 more groups")],
)  # fmt: skip
def test_processes_in_words(ranks: list[int], words: str) -> None:
    assert meeting._named(ranks) == words
