"""A save that is written while training goes on holds the state of its step, and is one at a time."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.checkpoint import background, store, writing
from ijepa_scale.checkpoint.background import BackgroundSaves
from ijepa_scale.checkpoint.writing import parts_to_write
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import SaveError

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
OPTIONS: dict[str, Any] = {"extra": {}, "keep": 9}


@given(st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_shares_are_equal_and_cover_every_element_once(count: int, sizes: list[int], own: int) -> None:
    held = {f"t{number}": torch.arange(float(size)) + 1000 * number for number, size in enumerate(sizes)}
    written = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    lengths = []
    for rank in range(count):
        pieces = [Piece(name=n, tensor=t, start=0, shape=tuple(t.shape), share=(rank, count)) for n, t in held.items()]
        alone = Piece(name="own", tensor=torch.ones(own), start=rank * own, shape=(count * own,))
        parts = parts_to_write([*pieces, alone])
        mine = [part for part in parts if part.name == "own"]
        assert [(part.start, part.tensor.numel()) for part in mine] == ([(rank * own, own)] if own else [])
        lengths.append(sum(part.tensor.numel() for part in parts if part.name != "own"))
        for part in parts:
            if part.name != "own":
                assert torch.equal(part.tensor, held[part.name][part.start : part.start + part.tensor.numel()])
                written[part.name][part.start : part.start + part.tensor.numel()] += 1
    assert all(times.eq(1).all() for times in written.values())
    assert max(lengths) - min(lengths) <= 1


def state(value: float) -> list[Piece]:
    return [Piece(name=name, tensor=torch.full((6,), value), start=0, shape=(6,)) for name in ("a", "b")]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event before which no file is written."""
    opened, write = threading.Event(), writing.write_tensors

    def waiting(*args: Any) -> Any:
        assert opened.wait(30)
        return write(*args)

    monkeypatch.setattr(writing, "write_tensors", waiting)
    return opened


def test_the_state_may_move_while_it_is_written(tmp_path: Path, gate: threading.Event) -> None:
    saves, pieces, ended = BackgroundSaves(ALONE), state(1.0), []
    for step in (1, 2):
        gate.clear()
        saves.start(tmp_path, step, pieces, ended=ended.append, **OPTIONS)
        assert saves.is_running and store.newest(tmp_path) == (tmp_path / "step-00000001" if step == 2 else None)
        for piece in pieces:
            piece.tensor.add_(1)
        gate.set()
        assert saves.wait() == tmp_path / f"step-0000000{step}" and not saves.is_running
    assert saves.wait() is None and all(isinstance(saved, Future) for saved in ended) and len(ended) == 2
    for step in (1, 2):
        filled = state(0.0)
        store.Checkpoint(tmp_path / f"step-0000000{step}").load(filled)
        assert all(piece.tensor.eq(step).all() for piece in filled)
    saves.close()


def test_two_at_once_are_a_mistake_of_the_caller(tmp_path: Path, gate: threading.Event) -> None:
    saves = BackgroundSaves(ALONE)
    saves.start(tmp_path, 1, state(1.0), ended=lambda _: None, **OPTIONS)
    with pytest.raises(AssertionError, match="two saves"):
        saves.start(tmp_path, 2, state(1.0), ended=lambda _: None, **OPTIONS)
    gate.set()
    saves.close()
    assert store.newest(tmp_path) == tmp_path / "step-00000001", "closing waits"


def test_an_error_is_told_in_the_thread_and_raised_when_waited_for(tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told: list[Future[Path]] = []
    saves = BackgroundSaves(ALONE)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_tensors", full)
        saves.start(tmp_path, 1, state(1.0), ended=told.append, **OPTIONS)
        with pytest.raises(SaveError, match="No space left on device; .* bytes are free"):
            saves.wait()
    assert isinstance(told[0].exception(), SaveError)
    saves.start(tmp_path, 2, state(2.0), ended=told.append, **OPTIONS)
    assert saves.wait() == tmp_path / "step-00000002"
    saves.close()


def test_too_little_memory_is_said_and_training_waits(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(background, "host_bytes", lambda: 47)  # the state has 48
    saves = BackgroundSaves(ALONE)
    for step in (1, 2):
        saves.start(tmp_path, step, state(1.0), ended=lambda _: None, **OPTIONS)
        assert not saves.is_running and (tmp_path / f"step-0000000{step}").is_dir()
        saves.wait()
    assert caplog.text.count("training waits for each save") == 1 and "checkpoint.asynchronous=false" in caplog.text
    monkeypatch.setattr(background, "host_bytes", lambda: 48)
    fitting = BackgroundSaves(ALONE)
    fitting.start(tmp_path, 3, state(1.0), ended=lambda _: None, **OPTIONS)
    fitting.wait()
    assert caplog.text.count("training waits for each save") == 1
