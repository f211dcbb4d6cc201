"""A run of which a process isn't heard ends and names it; one that is slow, sleeps or ends in order goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.errors import DataError, ReplicaError, SaveError
from ijepa_scale.stopping import Stopped
from ijepa_scale.train import link_watch
from ijepa_scale.train.hang_reports import Identity
from ijepa_scale.train.link_watch import LinkWatch, Word

TIMEOUT_S = 0.7
SLOW_S = 6.0  # where something is to be found before the timeout
HAS_ENDED = link_watch._has_ended  # which the tests replace
BROKEN = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.1.1.1]:4711"


class Process(LinkWatch):
    """One that notes its end, and is no longer heard after it. Its threads may outlive a test, and end nothing."""

    code: int | None = None

    def _exit(self, code: int) -> None:
        self.code = code
        self._done.set()
        self._wake.set()
        if not threading.current_thread().name.startswith("links"):  # those see that it is done
            raise SystemExit(code)


class Link:
    """A process's way to the store. Cut, it lets calls wait, as a dead connection does."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.is_up = store, threading.Event()
        self.is_up.set()

    def clone(self) -> Link:
        return self

    def set(self, key: str, value: str) -> None:
        self.is_up.wait()
        self._store.set(key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.is_up.wait()
        return self._store.multi_get(keys)


class Run:
    """Processes 0 and 1 on host a, 2 and 3 on host b and so on, as threads of this one."""

    def __init__(self, count: int, timeout_s: float = TIMEOUT_S) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        own = Identity.own()
        self.identities = [own._replace(pid=1000 + rank, host="ab"[rank // 2]) for rank in range(count)]
        self.links = [Link(store) for _ in range(count)]
        self.processes = [Process(self._world(rank, count), timeout_s) for rank in range(count)]
        for rank in range(count):
            store.set(f"link/{rank}", Word().packed())
        self.errors: dict[int, BaseException] = {}
        self._threads: dict[int, threading.Thread] = {}

    def _world(self, rank: int, count: int) -> Any:
        gather = lambda _: self.identities  # noqa: E731
        return SimpleNamespace(rank=rank, size=count, is_main=rank == 0, store=self.links[rank], gather_objects=gather)

    def begin(self, **work: Callable[[], None]) -> None:
        """Lets each process work: `p0=function`; those without any are never heard."""
        for name, function in work.items():
            rank = int(name[1:])
            self._threads[rank] = threading.Thread(target=self._run, args=(rank, function), daemon=True)
            self._threads[rank].start()

    def _run(self, rank: int, work: Callable[[], None]) -> None:
        try:
            with self.processes[rank].watching():
                work()
        except BaseException as error:
            self.errors[rank] = error

    def wait(self, *ranks: int, seconds: float = 15) -> None:
        """Waits until these have ended."""
        deadline = time.monotonic() + seconds
        for rank in ranks:
            while self.processes[rank].code is None and self._threads[rank].is_alive():
                assert time.monotonic() < deadline, f"process {rank} goes on"
                time.sleep(0.01)

    def codes(self) -> list[int | None]:
        return [process.code for process in self.processes]


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_watch, "_has_ended", lambda identity: identity.pid == 0)


def works(seconds: float = 60) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def fails(error: BaseException, after: float = 0.2) -> Callable[[], None]:
    def work() -> None:
        time.sleep(after)
        raise error

    return work


def lines(capfd: pytest.CaptureFixture) -> list[str]:
    """Returns what was printed; threads, unlike processes, may write two lines before either's end."""
    text = capfd.readouterr().err.replace("\n", "").partition("error (process ")
    return [f"error (process {line}" for line in text[2].split("error (process ") if line]


@given(st.builds(Word, beat=st.integers(0), about=st.integers(-1, 9), said=st.text(), code=st.integers(0, 255)))
def test_a_word_arrives_as_it_was_said(word: Word) -> None:
    assert Word.unpacked(word.packed().encode()) == word


def test_processes_that_are_heard_go_on(capfd) -> None:
    """Whatever their main threads do: they may work, or wait, for longer than the timeout."""
    run = Run(4)
    run.begin(p0=works(3 * TIMEOUT_S), p1=works(3 * TIMEOUT_S), p2=works(2 * TIMEOUT_S), p3=works(3 * TIMEOUT_S))
    run.wait(0, 1, 2, 3)
    assert run.codes() == [None] * 4 and not run.errors and not lines(capfd)


def test_a_silent_process_is_named_once_on_each_host(capfd) -> None:
    run = Run(4)
    begin = time.monotonic()
    run.begin(p0=works(), p1=works(), p3=works())
    run.wait(0, 1, 3)
    assert time.monotonic() - begin > TIMEOUT_S * 0.8
    assert run.codes() == [71, 71, None, 71]
    said = lines(capfd)
    assert sorted(line[:18] for line in said) == ["error (process 0):", "error (process 3):"], said
    assert all("of process 2 (1002 on b): it has stopped, or b doesn't answer; start the same" in line for line in said)
    assert all("nothing has been heard for 1 s (engine.link_timeout) of" in line for line in said)


def test_a_silent_main_process_is_named(capfd) -> None:
    run = Run(4)
    run.begin(p1=works(), p2=works(), p3=works())
    run.wait(1, 2, 3)
    assert run.codes() == [None, 71, 71, 71]
    said = lines(capfd)
    assert sorted(line[:18] for line in said) == ["error (process 1):", "error (process 2):"], said
    assert all("of process 0 (1000 on a): " in line for line in said)


def test_both_ends_of_a_cut_link_name_the_other(capfd) -> None:
    run = Run(4)
    run.begin(p0=works(), p1=works(), p2=works(), p3=works())
    time.sleep(0.3)
    for rank in (2, 3):
        run.links[rank].is_up.clear()
    run.wait(0, 1, 2, 3)
    assert run.codes() == [71] * 4
    near, far = sorted(lines(capfd))
    assert near.startswith("error (process 0)") and "of process 2 (1002 on b), process 3 (1003 on b): " in near
    assert far.startswith("error (process 2)") and "of process 0 (1000 on a): " in far and "or b is cut off" in far
    for rank in (2, 3):
        run.links[rank].is_up.set()


def test_a_link_that_comes_back_in_time_is_no_fault(capfd) -> None:
    run = Run(4)
    run.begin(**{f"p{rank}": works(2 * TIMEOUT_S) for rank in range(4)})
    time.sleep(0.3)
    run.links[2].is_up.clear()
    time.sleep(0.6 * TIMEOUT_S)
    run.links[2].is_up.set()
    run.wait(0, 1, 2, 3)
    assert run.codes() == [None] * 4 and not lines(capfd)


def test_a_machine_that_sleeps_is_no_fault(monkeypatch, capfd) -> None:
    run = Run(2)
    run.begin(p0=works(1.0), p1=works(1.0))
    time.sleep(0.3)
    monotonic = time.monotonic
    with monkeypatch.context() as sleeping:
        sleeping.setattr(link_watch.time, "monotonic", lambda: monotonic() + 3600)
        time.sleep(0.4)
    assert run.codes() == [None] * 2 and not lines(capfd)
    run.wait(0, 1)


@pytest.mark.parametrize("first", [0, 1, pytest.param(3, marks=pytest.mark.long)])
def test_ends_in_order_are_no_fault(first: int, capfd) -> None:
    """Whoever ends first, and by whatever order: the others may write results for longer than the timeout."""
    run = Run(4)
    later = {f"p{rank}": works(2 * TIMEOUT_S) for rank in range(1, 4) if rank != first}
    run.begin(**{f"p{first}": fails(Stopped("asked")) if first == 3 else works(0.2)}, **later)
    if first:
        run.begin(p0=works(2 * TIMEOUT_S))
    run.wait(0, 1, 2, 3)
    assert run.codes() == [None] * 4 and not lines(capfd)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("no such shard"), 2),
        (KeyError("x"), 1),
        pytest.param(SaveError("disk full"), 74, marks=pytest.mark.long),
        pytest.param(ReplicaError("differ"), 70, marks=pytest.mark.long),
    ],
)
def test_an_error_ends_the_others_with_its_code(rank: int, error: Exception, code: int, capfd) -> None:
    """The host that has seen the error isn't told again."""
    run = Run(4)
    run.begin(**{f"p{other}": fails(error) if other == rank else works() for other in range(4)})
    run.wait(0, 1, 2, 3)
    assert run.errors[rank] is error
    assert run.codes() == [None if other == rank else code for other in range(4)]
    (said,) = lines(capfd)
    assert said.startswith(
        f"error (process {0 if rank else 2}): process {rank} (100{rank} on {'b' if rank else 'a'}) has"
    )
    assert said.endswith("KeyError: 'x'" if code == 1 else str(error))


def test_an_error_on_every_process_is_each_ones_own(capfd) -> None:
    run, errors = Run(4), [DataError(str(rank)) for rank in range(4)]
    run.begin(**{f"p{rank}": fails(error, 0.2 + 0.05 * rank) for rank, error in enumerate(errors)})
    run.wait(0, 1, 2, 3)
    assert [run.errors[rank] for rank in range(4)] == errors and not lines(capfd)


@pytest.mark.parametrize(
    "gone", [0, pytest.param(1, marks=pytest.mark.long), 2, pytest.param(3, marks=pytest.mark.long)]
)
def test_a_broken_connection_is_explained(gone: int, capfd) -> None:
    """By the one that has ended: at once on its own host, and before the timeout on any."""
    run = Run(4, timeout_s=SLOW_S)
    alive = [rank for rank in range(4) if rank != gone]
    run.begin(**{f"p{rank}": fails(RuntimeError(BROKEN), 0.5) for rank in alive}, **{f"p{gone}": works()})
    time.sleep(0.2)
    run.processes[gone]._done.set()
    run.identities[gone] = run.identities[gone]._replace(pid=0)
    begin = time.monotonic()
    run.wait(*alive)
    assert time.monotonic() - begin < 0.8 * SLOW_S
    assert [run.codes()[rank] for rank in alive] == [71] * 3
    said = lines(capfd)
    assert len(said) == 2 and all(f"process {gone} (0 on {'ab'[gone // 2]})" in line for line in said), said


def test_a_broken_connection_to_one_that_failed_is_explained_by_its_error(capfd) -> None:
    run = Run(4, timeout_s=SLOW_S)
    error = DataError("no such shard")
    run.begin(p0=fails(RuntimeError(BROKEN), 0.3), p1=fails(RuntimeError(BROKEN), 0.3), p2=fails(error), p3=works())
    run.wait(0, 1, 2, 3)
    assert run.codes() == [2, 2, None, 2] and run.errors[2] is error
    (said,) = lines(capfd)
    assert said == "error (process 0): process 2 (1002 on b) has ended: no such shard"


def test_a_broken_connection_that_nobody_explains_is_told_as_it_is(caplog) -> None:
    run = Run(2)
    error = RuntimeError(BROKEN)
    run.begin(p0=fails(error), p1=works(2.0))
    run.wait(0)
    assert run.errors[0] is error and run.codes()[0] is None
    assert "all processes are still heard of" in caplog.text


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError(BROKEN), True),
        (dist.DistBackendError("NCCL error"), True),
        (dist.DistStoreError("wait timeout"), True),
        (RuntimeError("shapes differ"), False),
        (ConnectionResetError("of a server of shards"), False),
        (None, False),
    ],
)
def test_errors_of_collectives_are_known(error: BaseException | None, found: bool) -> None:
    assert link_watch._is_of_connection(error) is found
    with contextlib.suppress(SaveError):
        try:
            if error is not None:
                raise error
        except BaseException:
            raised = SaveError("can't be saved")
            try:
                raise raised
            finally:
                assert link_watch._is_of_connection(raised) is found


@pytest.mark.parametrize(("timeout_s", "size", "store"), [(0.0, 2, "store"), (9.0, 1, "store"), (9.0, 2, None)])
def test_nothing_is_watched_without_others(timeout_s: float, size: int, store: Any) -> None:
    threads = threading.active_count()
    with LinkWatch(SimpleNamespace(rank=0, size=size, store=store), timeout_s).watching():  # type: ignore[arg-type]
        assert threading.active_count() == threads


def test_ended_processes_are_seen() -> None:
    own = Identity.own()
    assert not HAS_ENDED(own)
    assert HAS_ENDED(own._replace(created=1.0)), "another process has got its number"
    child = psutil.Popen(["true"])
    identity = own._replace(pid=child.pid, created=child.create_time())
    while child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert HAS_ENDED(identity), "nobody has asked for its code yet"
    child.wait()
    assert HAS_ENDED(identity) and identity.pid != os.getpid()
