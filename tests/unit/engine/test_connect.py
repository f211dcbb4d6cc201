"""A store that can't be reached or served is one line in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ijepa_scale.engine import connect as connecting
from ijepa_scale.engine.connect import connect
from ijepa_scale.environment import free_port
from ijepa_scale.errors import ConfigError
from ijepa_scale.launchers import Launch


def launch(rank: int, port: int, address: str = "127.0.0.1") -> Launch:
    return Launch(rank=rank, world_size=2, local_world_size=2, local_rank=rank, address=address, port=port)


def soon(seconds: float = 0.3) -> float:
    return time.monotonic() + seconds


def test_whoever_comes_first() -> None:
    for delays in ((0.5, 0.0), (0.0, 0.5)):
        port = free_port()

        stores: list[object] = []

        def process(
            rank: int, port: int = port, delays: tuple[float, float] = delays, stores: list[object] = stores
        ) -> str | None:
            time.sleep(delays[rank])
            store, address = connect(launch(rank, port), soon(20))
            store.set(f"{rank}", "here")
            store.wait(["0", "1"])
            stores.append(store)
            return address

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(process, range(2))) == [None, "127.0.0.1"]


def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on port {port} of .* in use.; end the program"):
            connect(launch(0, port), soon())


@pytest.mark.parametrize("port", [70_000, 1])
def test_a_port_that_is_none(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"can't reach process 0 at 127.0.0.1:{port} .* within"):
        connect(launch(1, port), soon())
    if port > 65_535:
        with pytest.raises(ConfigError, match=f"can't listen on port {port}"):
            connect(launch(0, port), soon())


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "connection refused"),
        ("no.such.host.invalid", "doesn't know that name"),
        ("a" * 80, "doesn't know"),
    ],
)
def test_process_0_that_is_not_there(address: str, why: str, monkeypatch, caplog) -> None:
    monkeypatch.setattr(connecting, "TELL_S", 0.0)
    waiting = Launch(rank=1, world_size=2, address=address, port=free_port())
    with pytest.raises(ConfigError, match=f"can't reach process 0 at {address}:.*{why}.* within . s; check"):
        connect(waiting, soon(0.5))
    assert f"waiting for process 0 at {address}:" in caplog.text


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Accepts connections, reads what comes and never answers."""
    server = socket.create_server(("", 0))
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                kept.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()
    for each in kept:
        each.close()


def test_another_program_at_the_port_of_process_0(silent_server: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "_TRY_S", 0.5)
    with pytest.raises(ConfigError, match="finds something at .* that doesn't answer as process 0 of a run does; set"):
        connect(launch(1, silent_server), soon())


def test_an_address_of_another_host_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    connect(launch(0, free_port(), address="192.0.2.1"), soon())  # of TEST-NET-1, RFC 5737
    assert "MASTER_ADDR is 192.0.2.1 (192.0.2.1), which isn't an address of" in caplog.text
    caplog.clear()
    connect(launch(0, free_port(), address="localhost"), soon())
    assert not caplog.text
