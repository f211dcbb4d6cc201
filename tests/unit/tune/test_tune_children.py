"""Child processes may die in any way: the reason is reported, and no process is left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tune_children as what

from ijepa_scale import environment
from ijepa_scale.tune import children as children_module
from ijepa_scale.tune.children import Children

LIMIT_S = 120  # enough for a busy machine


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Children:
    return Children(tmp_path_factory.mktemp("logs"))


def test_all_processes_answer(children: Children) -> None:
    outcome = children.run(what.answer, [1, 2], processes=2, limit_s=LIMIT_S)
    assert outcome.kind == "done" and outcome.seconds > 0
    assert outcome.values == tuple({"argument": [1, 2], "rank": rank, "size": 2} for rank in (0, 1))


@pytest.mark.parametrize(
    ("function", "kind", "reason"),
    [
        (
            what.kill_itself,
            "signal",
            "killed by SIGKILL: the system ran out of memory, or a user killed it (in the first steps)",
        ),
        (what.allocate_too_much, "memory", "out of memory (in the step with the longest masks)"),
        (what.refuse, "refused", "engine.strategy is odd"),
        (what.break_down, "error", "KeyError: 'nothing there'"),
        (what.leave, "error", "ended with exit code 7 without a message"),
    ],
)
def test_the_reason_of_a_death_is_reported(children: Children, function: what.Any, kind: str, reason: str) -> None:
    outcome = children.run(function, None, limit_s=LIMIT_S)
    assert (outcome.kind, outcome.reason, outcome.values) == (kind, reason, ())


def test_what_was_noted_before_a_death_is_kept(children: Children) -> None:
    assert children.run(what.kill_itself, None, limit_s=LIMIT_S).notes["rate"] == 3


def test_one_death_ends_the_group(children: Children) -> None:
    begin = time.monotonic()
    outcome = children.run(what.die_on_process_1, None, processes=2, limit_s=LIMIT_S)
    assert (outcome.kind, outcome.reason) == ("memory", "out of memory")
    assert time.monotonic() - begin < LIMIT_S / 2


def test_logs_keep_the_traceback(tmp_path: Path) -> None:
    Children(tmp_path / "logs").run(what.break_down, None, limit_s=LIMIT_S)
    assert 'raise KeyError("nothing there")' in (tmp_path / "logs" / "001-0.log").read_text()


def test_a_child_that_takes_too_long_is_killed_with_its_children(children: Children, tmp_path: Path) -> None:
    outcome = children.run(what.sleep_with_a_child, str(tmp_path / "pids"), limit_s=4)
    assert (outcome.kind, outcome.reason) == ("time", "took longer than 4 s")
    if (tmp_path / "pids").exists():  # else the machine was too busy to start it
        assert gone(tmp_path / "pids")


def test_what_a_child_leaves_behind_ends_with_it(children: Children, tmp_path: Path) -> None:
    outcome = children.run(what.leave_a_child, str(tmp_path), processes=2, limit_s=60)
    assert outcome.kind == "done", outcome.reason  # process 1 waits for the end of what process 0 has left


class Child:
    """A child in the eyes of its parent."""

    def __init__(self, pid: int, exitcode: int | None) -> None:
        self.pid, self.exitcode = pid, exitcode
        self.joined: list[float | None] = []

    def kill(self) -> None:
        pass

    def join(self, timeout: float | None = None) -> None:
        self.joined.append(timeout)


def test_a_number_that_now_belongs_to_others_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        what_ended = Child(other.pid, exitcode=0)
        children_module._end(what_ended)
        other.communicate(b"\n", timeout=60)
        assert other.returncode == 0, "it wasn't killed"


def test_a_child_that_does_not_end_is_reported(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as sleeping:
        stuck = Child(sleeping.pid, exitcode=None)
        known = {stuck}
        monkeypatch.setattr(multiprocessing.process, "_children", known)
        children_module._end(stuck)
    assert stuck.joined == [10.0] and not known, "Python would wait for it at its end"
    assert f"process {sleeping.pid} hasn't ended 10 s after it was killed" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_outlives_the_parent(number: signal.Signals, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    here = Path(__file__).parent
    parent = subprocess.Popen(
        [sys.executable, str(here / "tune_children.py"), str(pids)],
        env=environment.child_environment(PYTHONPATH=f"{here}{os.pathsep}{here.parents[2]}", TMPDIR=str(tmp_path)),
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that the signal reaches only this process
    )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not pids.exists():
            assert time.monotonic() < deadline and parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(number)
        parent.wait(timeout=60)
        assert gone(pids)
    finally:
        parent.kill()


def gone(pids: Path) -> bool:
    """Returns whether the processes listed in a file end within 30 s."""
    deadline = time.monotonic() + 30
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # a zombie is dead, but its parent hasn't waited for it yet
