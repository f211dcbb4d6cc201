"""A store that stops answering, since process 0 is stopped or its host is frozen, ends a start in time."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from ijepa_scale import environment
from ijepa_scale.engine import start
from ijepa_scale.engine.agreement import agree
from ijepa_scale.engine.meeting import Member, meet
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch
from ijepa_scale.no_answer import within
from tests.unit.served_store import served_store

LONG_S = 30.0  # a wait without an end


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen, int]]:
    """Returns a process that serves a store, and its port; what still waits for it ends with the test."""
    with served_store() as served:
        yield served


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_OVERTIME_S", 0.5)
    monkeypatch.setattr(start, "_SPARE_S", 0.5)
    monkeypatch.setattr(start, "_LEAST_S", 1.0)
    monkeypatch.setattr(start, "LINGER_S", 0.5)
    monkeypatch.setattr(environment, "export", lambda _: None)  # variables that later tests would inherit


def client(port: int) -> Store:
    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


def world(store: Store) -> World:
    members = tuple(Member.own(rank, 2) for rank in range(2))
    device = torch.device("cpu")
    return World(rank=1, size=2, local_rank=1, local_size=2, device=device, store=store, members=members)


def started(port: int, timeout_s: float, *, store_is_there: bool = False) -> ConfigError:
    """Returns the error of a process 1 that starts."""
    launch = Launch(
        rank=1, world_size=2, local_rank=1, local_world_size=2, address="127.0.0.1", port=port,
        store_is_there=store_is_there,
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        within(LONG_S, lambda: start.start_world(launch, torch.device("cpu"), timeout_s=timeout_s))
    return error.value


@pytest.mark.parametrize(("store_is_there", "who"), [(False, "process 0"), (True, "the launcher's store")])
def test_a_store_that_stops_during_the_meeting(
    store_is_there: bool, who: str, server: tuple[subprocess.Popen, int]
) -> None:
    serving, port = server
    looking = client(port)

    def stop() -> None:
        looking.wait(["hello/1"])
        serving.send_signal(signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    error = started(port, 2.0, store_is_there=store_is_there)
    thread.join()
    assert str(error).startswith(f"{who} at 127.0.0.1:{port} doesn't answer process 1 (")
    assert "s after it began to start; check that it isn't stopped" in str(error)


def test_a_store_that_stops_before_the_group_is_made(
    server: tuple[subprocess.Popen, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, port = server
    monkeypatch.setattr(start, "_choose_interface", lambda *_: serving.send_signal(signal.SIGSTOP))

    def process_0() -> None:
        deadline = time.monotonic() + LONG_S
        part, members = meet(client(port), Member.own(0, 2), deadline)
        agree(part, members, 0, {"the kind of device": "cpu"}, deadline)

    thread = threading.Thread(target=process_0)
    thread.start()
    error = started(port, LONG_S / 10)
    thread.join()
    assert "has lost the others while they started (no answer in" in str(error)


def test_an_error_is_told_though_the_store_does_not_answer(server: tuple[subprocess.Popen, int]) -> None:
    serving, port = server
    part = PrefixStore("part", client(port))
    serving.send_signal(signal.SIGSTOP)
    assert within(LONG_S, lambda: start.tells_first(world(part), ConfigError("lr is -1")))


def test_an_error_from_before_the_meeting_is_told_though_the_store_stops(
    server: tuple[subprocess.Popen, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, port = server
    connected = client(port)
    serving.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(start, "_EARLY_S", 0.5)
    monkeypatch.setattr(start, "connect", lambda launch, deadline: (connected, None))
    launch = Launch(rank=1, world_size=2, address="127.0.0.1", port=port)
    assert within(LONG_S, lambda: start.tells_early(launch, ConfigError("lr is -1")))


def test_a_store_that_answers_is_asked_who_tells() -> None:
    store = HashStore()
    assert [start.tells_first(world(store), ConfigError("lr is -1")) for _ in range(2)] == [True, False]
