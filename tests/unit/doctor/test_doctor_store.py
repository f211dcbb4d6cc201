"""The doctor ends in time with a verdict where the store of its processes stops answering."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.distributed import TCPStore

from ijepa_scale.doctor import board as boards
from ijepa_scale.doctor import examination
from ijepa_scale.doctor.board import Board
from ijepa_scale.engine.world import World
from ijepa_scale.environment import Launch
from ijepa_scale.no_answer import NoAnswer, within
from tests.unit.served_store import served_store

LONG_S = 20.0  # a wait without an end


class Left(Exception):
    """In place of `os._exit`."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen, int]]:
    """Returns a process that serves a store, and its port."""
    monkeypatch.setattr(boards, "_ANSWER_S", 0.3)
    with served_store() as served:
        yield served


def world(rank: int, port: int) -> World:
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    device = torch.device("cpu")
    return World(rank=rank, size=2, local_rank=rank, local_size=2, device=device, store=store)


def leave(code: int) -> None:
    raise Left(code)


ASKED: list[Callable[[Board], object]] = [
    lambda board: board.hear("verdict", 0.1),
    lambda board: board.assemble(0.1),
    lambda board: board.collect(0.1),
]


@pytest.mark.parametrize("ask", ASKED, ids=["hear", "assemble", "collect"])
def test_what_is_asked_of_a_store_that_stops_ends(ask: Callable, server: tuple[subprocess.Popen, int]) -> None:
    serving, port = server
    board = Board(world(0, port))
    serving.send_signal(signal.SIGSTOP)
    for _ in range(2):  # the second one waits for the connection, which the first one holds
        with pytest.raises(NoAnswer, match="no answer in 0.4 s"):
            within(LONG_S, lambda: ask(board))
    with pytest.raises(NoAnswer):
        within(LONG_S, lambda: board.tell("verdict", ""))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_stops_is_wrong(
    rank: int,
    server: tuple[subprocess.Popen, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    serving, port = server
    monkeypatch.setattr(examination.os, "_exit", leave)
    monkeypatch.setattr(examination, "LOCAL_S", 0.1)
    monkeypatch.setattr(examination, "LINKS_S", 0.1)
    monkeypatch.setattr(examination, "_host", lambda patient: None)

    def meet(patient: object) -> tuple[World, Board]:
        here = world(rank, port)
        board = Board(here)
        serving.send_signal(signal.SIGSTOP)
        return here, board

    monkeypatch.setattr(examination, "_meet", meet)
    options = examination.DoctorOptions(folder="/nowhere", data=None, config=None, need=None, json=None)
    launch = Launch(rank=rank, world_size=2, local_rank=rank, local_world_size=2, address="a", port=port)
    with pytest.raises(Left, match="1"):
        within(LONG_S, lambda: examination.examine_here(options, launch, torch.device("cpu")))
    said = capsys.readouterr()
    if rank:
        assert "wrong (process 1): process 0 doesn't answer: no answer in 0.3 s" in said.err
    else:
        assert f"the launcher's store at a:{port} doesn't answer" in said.out
