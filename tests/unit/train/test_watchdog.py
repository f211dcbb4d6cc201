"""A run without progress ends and names who holds it up; one that saves, evaluates or warms up slowly goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale import terminal
from ijepa_scale.config import EngineConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.engine.world import TIMEOUT
from ijepa_scale.errors import ConfigError
from ijepa_scale.train import hang_reports, watchdog
from ijepa_scale.train.hang_reports import DATA, Identity, Report, blame
from ijepa_scale.train.pretrain import PretrainTask, pretrain
from ijepa_scale.train.saver import Saver
from ijepa_scale.train.watchdog import Beat, Watchdog
from tests.unit.train.test_saver import configured
from tests.unit.train.test_start import ALONE, data

__all__ = ["data"]

TIMEOUT_S = 0.6


def test_a_hang_is_found_before_collectives_give_up() -> None:
    last = TIMEOUT.total_seconds()
    assert EngineConfig(hang_timeout=last - 1).hang_timeout == last - 1
    for value in (last, -1.0):
        with pytest.raises(ConfigError, match=rf"hang_timeout.*from 0 to below {last:g}"):
            EngineConfig(hang_timeout=value)


def report(step: int, phase: str = "step", *, waits: bool = True, **helpers: list[int]) -> Report:
    return Report(asks=True, hangs=True, phase=phase, step=step, waits=waits, helpers=helpers, count=0)


def identities(count: int) -> list[Identity]:
    return [Identity(1000 + rank, "elsewhere", 0.0) for rank in range(count)]


def named(said: str, count: int) -> list[int]:
    return [rank for rank in range(count) if f"process {rank} ({1000 + rank} on elsewhere)" in said]


@given(st.data())
def test_who_is_behind_is_named(draw: st.DataObject) -> None:
    """Whatever the others do: silent before late, waiting for the data of a step before being in it."""
    count = draw.draw(st.integers(1, 8))
    phases = st.sampled_from([DATA, "step"])
    found = {rank: report(draw.draw(st.integers(7, 9)), draw.draw(phases)) for rank in range(count)}
    silent = draw.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
    for rank in silent:
        del found[rank]
    said = blame(found, identities(count))
    places = [(found[rank].step, found[rank].phase != DATA) if rank in found else (0, False) for rank in range(count)]
    behind = [rank for rank in range(count) if places[rank] == min(places)]
    if len(behind) == count > 1 and places[0][1] and not silent:
        assert "all processes are in step" in said and not named(said, count)
    else:
        assert named(said, count) == behind


def test_who_works_while_others_wait_is_named() -> None:
    found = {0: report(7), 1: report(7, waits=False), 2: report(7)}
    assert named(blame(found, identities(3)), 3) == [1]
    assert named(blame({0: report(7, waits=False)}, identities(1)), 1) == [0]


def test_a_stopped_loader_is_named() -> None:
    found = {0: report(7), 1: report(7, DATA, sleeping=[5, 6], stopped=[4242])}
    assert blame(found, identities(2)).endswith("process 1 (1001 on elsewhere); its child 4242 is stopped")


def test_a_long_list_is_cut() -> None:
    said = blame({0: report(7)}, identities(1000))
    assert named(said, 1000) == list(range(1, 9)) and " and 991 more; " in said


def test_the_state_of_a_process_is_that_of_this_process_only() -> None:
    own = Identity.own()
    assert own.state() in ("it is running", "it is sleeping")
    assert own._replace(created=1.0).state() == "it has ended", "another process has got its number"
    assert "elsewhere doesn't answer" in own._replace(host="elsewhere").state()


class Dog(Watchdog):
    """One whose end is noted. Its threads may outlive a test, and end nothing."""

    ends: dict[int, str]

    def _end(self, why: str) -> None:
        self.ends[self._world.rank] = why
        self._done.set()


class Processes:
    """Several watchdogs in this process, each with its own end. Their main threads are the test."""

    def __init__(self, folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: dict[int, str] = {}
        self.folder = folder
        monkeypatch.setattr(watchdog, "_GRACE", (0.6, 0.6))
        self.dogs = [Dog(folder, self._world(rank, count), TIMEOUT_S) for rank in range(count)]
        for dog in self.dogs:
            dog.ends = self.ends

    def _world(self, rank: int, count: int) -> Any:
        return SimpleNamespace(
            rank=rank, size=count, gather_objects=lambda _: identities(count), broadcast_object=lambda _: "now"
        )

    def run(self, ranks: list[int], seconds: float) -> None:
        contexts = [self.dogs[rank].watching() for rank in ranks]
        for context in contexts:
            context.__enter__()
        deadline = time.monotonic() + seconds
        while len(self.ends) < len(ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        for context in contexts:
            context.__exit__(None, None, None)

    def said(self) -> list[str]:
        return [why for why in self.ends.values() if why]


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_does_not_answer_is_named_once(silent: int, tmp_path: Path, monkeypatch) -> None:
    processes = Processes(tmp_path, 3, monkeypatch)
    others = [rank for rank in range(3) if rank != silent]
    for dog in processes.dogs:
        dog._beat = Beat("step", 5)
    processes.run(others, 20)
    assert sorted(processes.ends) == others
    (said,) = processes.said()
    assert said.startswith("no answer") and named(said, 3) == [silent]
    for rank in others:
        text = (tmp_path / "stacks" / "now" / f"process-{rank:05d}.txt").read_text()
        assert "thread MainThread" in text and "in step" not in text.partition("\n")[0]
        assert "test_a_process_that_does_not_answer_is_named_once" in text


def test_a_process_in_an_evaluation_keeps_the_others_waiting(tmp_path: Path, monkeypatch) -> None:
    processes = Processes(tmp_path, 2, monkeypatch)
    processes.dogs[0]._beat, processes.dogs[1]._beat = Beat("step", 5), Beat("evaluating", 4)

    def go_on() -> None:
        time.sleep(5 * TIMEOUT_S)
        assert sorted(path.name for path in (tmp_path / "stacks" / "now").iterdir()) == [
            "process-00000.txt", "process-00001.txt",
        ]  # fmt: skip
        for _ in range(20):
            for dog in processes.dogs:
                dog._beat = Beat("step", dog._beat.step + 1)
            time.sleep(0.1)
        moved.append(True)

    moved: list[bool] = []
    thread = threading.Thread(target=go_on)
    thread.start()
    processes.run([0, 1], 5 * TIMEOUT_S + 1.5)
    thread.join()
    assert moved and not processes.ends
    assert not list(tmp_path.iterdir()), "what they wrote is withdrawn"


def test_a_process_that_does_not_answer_ends_an_evaluation_too(tmp_path: Path, monkeypatch) -> None:
    processes = Processes(tmp_path, 3, monkeypatch)
    for dog in processes.dogs:
        dog._beat = Beat("evaluating", 5)
    begin = time.monotonic()
    processes.run([0, 2], 20)
    assert time.monotonic() - begin > 2 * TIMEOUT_S
    assert sorted(processes.ends) == [0, 2]
    (said,) = processes.said()
    assert said.startswith("no answer") and named(said, 3) == [1]


@pytest.mark.parametrize("phase", ["step", pytest.param("evaluating", marks=pytest.mark.long)])
def test_a_process_that_stops_after_its_answer_is_named(phase: str, tmp_path: Path, monkeypatch) -> None:
    """Its report stays where it is, and would excuse it for ever."""
    processes = Processes(tmp_path, 3, monkeypatch)
    for dog in processes.dogs:
        dog._beat = Beat(phase, 5)
    processes.dogs[1]._beat = Beat("evaluating", 5)  # which may take its time, as long as it answers

    def stop() -> None:
        while not (tmp_path / "stacks" / "now" / "process-00001.txt").exists():
            time.sleep(0.02)
        assert not processes.ends
        processes.dogs[1]._done.set()

    thread = threading.Thread(target=stop)
    thread.start()
    processes.run([0, 1, 2], 20)
    thread.join()
    assert sorted(processes.ends) == [0, 2]
    (said,) = processes.said()
    assert said.startswith("no answer") and named(said, 3) == [1]


def test_nobody_is_waited_for_at_the_end(tmp_path: Path, monkeypatch) -> None:
    """There some processes have left, and others write results."""
    processes = Processes(tmp_path, 2, monkeypatch)
    processes.dogs[0]._beat = Beat("ending", 5)
    processes.run([0], 4 * TIMEOUT_S)
    assert not processes.ends and not list(tmp_path.iterdir())


def test_a_process_in_a_longer_step_is_waited_for_and_then_named(tmp_path: Path, monkeypatch) -> None:
    """It answers at once, but its own time runs out later."""
    processes = Processes(tmp_path, 2, monkeypatch)
    processes.dogs[0]._beat, processes.dogs[1]._beat = Beat("step", 5), Beat("evaluating", 4)
    timer = threading.Timer(3 * TIMEOUT_S, lambda: setattr(processes.dogs[1], "_beat", Beat(DATA, 5)))
    timer.start()
    begin = time.monotonic()
    processes.run([0, 1], 20)
    assert time.monotonic() - begin > 4 * TIMEOUT_S
    (said,) = processes.said()
    assert "waiting for the data of step 5" in said and named(said, 2) == [1]


@pytest.mark.parametrize("kind", ["refused", "hanging"])
def test_a_folder_that_fails_does_not_keep_a_hanging_run(kind: str, tmp_path: Path, monkeypatch) -> None:
    processes = Processes(tmp_path, 2, monkeypatch)
    processes.dogs[0]._beat = Beat(DATA, 5)
    if kind == "refused":
        (tmp_path / "stacks").write_text("a file")
    else:
        monkeypatch.setattr(hang_reports, "write", lambda *_: time.sleep(4))
    processes.run([0], 20)
    (said,) = processes.said()
    assert ("can't be used" if kind == "refused" else f"{tmp_path} doesn't answer") in said
    assert "waiting for the data of step 5" in said and not named(said, 2)


def test_a_stopped_helper_is_killed_and_no_other() -> None:
    sleeping, stopped = (psutil.Popen(["sleep", "60"]) for _ in range(2))
    try:
        stopped.suspend()
        while stopped.pid not in hang_reports.helpers().get("stopped", []):
            time.sleep(0.01)
        hang_reports.end_stopped_helpers()
        assert stopped.wait(10) == -9 and sleeping.is_running()
    finally:
        for process in filter(psutil.Popen.is_running, (sleeping, stopped)):
            process.kill()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Lets processes go on, and returns the codes that they would have ended with."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    yield codes
    for thread in threading.enumerate():
        if thread.name.startswith("watchdog"):
            thread.join()  # before it finds the real one


@pytest.mark.parametrize("slow", ["first step, evaluation, save", "step 2", "data"])
def test_only_steps_and_data_are_timed(slow: str, tmp_path: Path, data: Path, monkeypatch, ended, capfd) -> None:
    seconds = 1.8
    step, evaluate, save, loader = PretrainTask.step, PretrainTask.evaluate, Saver.save, TrainLoader.__iter__
    calls: list[str] = []

    def slowed(method: Any, name: str, number: int = 0) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if name in slow and calls.count(name) == number + 1:
                time.sleep(seconds)
            return method(*args, **options)

        return call

    def late(batches: TrainLoader) -> Iterator[Any]:
        for batch in loader(batches):
            if slow == "data" and batch.step == 2:
                time.sleep(seconds)
            yield batch

    monkeypatch.setattr(PretrainTask, "step", slowed(step, "step", 0 if "first step" in slow else 2))
    monkeypatch.setattr(PretrainTask, "evaluate", slowed(evaluate, "evaluation", 1))
    monkeypatch.setattr(Saver, "save", slowed(save, "save"))
    monkeypatch.setattr(TrainLoader, "__iter__", late)
    pretrain(configured(tmp_path, data, "run", engine__hang_timeout=1.0, data__workers=0), ALONE)
    said = capfd.readouterr().err
    assert all(calls.count(name) >= 2 for name in ("step", "evaluation", "save"))
    if slow in ("step 2", "data"):
        assert terminal.HANG_CODE in ended and "no step has ended for 1 s (engine.hang_timeout)" in said
        where = "in step 2" if slow == "step 2" else "waiting for the data of step 2"
        assert f"{where}: process 0 ({os.getpid()} on" in said and f"the stacks are in {tmp_path}/run/stacks/" in said
    else:
        assert not ended and not (tmp_path / "run" / "stacks").exists() and "hang_timeout" not in said
