"""Workers that are killed, stopped or lose their fork server: what they had is done again, bit for bit, or one line."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, synchronize
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data import workers as data_workers
from ijepa_scale.data.eval_reader import EvalReader
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.data.work_signs import show_work
from ijepa_scale.data.workers import Recovery, ordered_loader, set_recovery
from ijepa_scale.errors import DataError
from ijepa_scale.stopping import SIGNALS
from tests.unit.data.test_data_loader import a_loader, a_source, batches_of


@pytest.fixture(autouse=True)
def recovery(monkeypatch):
    monkeypatch.setattr(data_workers, "_process", data_workers._Process())
    set_recovery(Recovery(restarts=1000))


def workers():
    """Returns the processes that this process's loaders have now."""
    return [child for child in multiprocessing.active_children() if child.pid is not None]


def digests(loader, before_batch=lambda number: None):
    """Returns a hash of every byte of every batch, in order; calls a function before each is asked for."""
    found = []
    for number, batch in enumerate(loader):
        parts = (batch.pixels.numpy(), batch.labels.numpy(), batch.sizes, batch.sample_ids)
        content = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        found.append((batch.step, batch.epoch, batch.position, hashlib.sha256(content).hexdigest()))
        before_batch(number)
    return found


def wait_until_gone(pids):
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and state(pid) != "Z" for pid in pids):
        assert time.monotonic() < deadline, f"{pids} are still there"
        time.sleep(0.05)


def state(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def kills_at_random_moments(seed, kinds, kills):
    """Returns a function that, before some batches, sends a signal to a random worker, at once or in a moment."""
    generator = np.random.default_rng(seed)
    at = set(generator.choice(20, kills, replace=False).tolist())
    seen: set[int] = set()

    def before(number):
        seen.update(worker.pid for worker in workers())
        if number in at:
            time.sleep(float(generator.uniform(0, 0.03)))
            victims = workers()
            if victims:
                chosen = victims[int(generator.integers(len(victims)))].pid
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chosen, kinds[int(generator.integers(len(kinds)))])

    before.seen = seen
    return before


def compare_under_fire(tmp_path, seed, kinds, kills):
    source = a_source(tmp_path, count=64, bad=(4, 17))
    undisturbed = a_loader(source, stop_step=24)
    expected = digests(undisturbed)
    loader = a_loader(source, stop_step=24, workers=2)
    before = kills_at_random_moments(seed, kinds, kills)
    assert digests(loader, before) == expected
    assert (loader.num_seen, loader.bad) == (undisturbed.num_seen, undisturbed.bad)  # each bad sample counts once
    wait_until_gone(before.seen)


def test_killed_workers_change_no_byte(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        compare_under_fire(tmp_path, 0, [signal.SIGKILL], kills=2)
    said = [record.getMessage() for record in caplog.records if "starting the 2 workers again" in record.getMessage()]
    assert 1 <= len(said) <= 2
    assert re.match(r"data worker \d+ was ended by SIGKILL, as when memory runs out; .*\(1 of 1000 times\)", said[0])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_many_kills_and_stops_change_no_byte(tmp_path, seed):
    set_recovery(Recovery(restarts=1000, timeout_s=4.0))
    compare_under_fire(tmp_path, seed, [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV], kills=5)


def test_a_stopped_worker_is_replaced(tmp_path, caplog):
    set_recovery(Recovery(timeout_s=4.0))
    source = a_source(tmp_path)
    expected = digests(a_loader(source))
    stopped = []

    def stop(number):
        if number == 0:
            stopped.append(workers()[0].pid)
            os.kill(stopped[0], signal.SIGSTOP)

    with caplog.at_level(logging.WARNING):
        assert digests(a_loader(source, workers=2), stop) == expected
    assert re.search(rf"gave nothing for \d+ s \({stopped[0]} stopped\); starting the 2 workers again", caplog.text)
    wait_until_gone(stopped)


def test_it_works_without_descriptors_of_processes(tmp_path, monkeypatch):
    """As on Linux before 5.3, with a Python that was built there, and where a container's rules forbid the call."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.delattr(signal, "pidfd_send_signal", raising=False)
    compare_under_fire(tmp_path, 0, [signal.SIGKILL], kills=1)
    set_recovery(Recovery(restarts=0))
    assert digests(a_loader(a_source(tmp_path / "other"), workers=1))  # nothing is restarted without a reason


def test_the_fork_server_may_be_killed(tmp_path, caplog):
    source = a_source(tmp_path)
    expected = digests(a_loader(source, stop_step=40))
    orphans = []

    def kill(number):
        if number == 3:
            orphans.extend(worker.pid for worker in workers())
            os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
            time.sleep(1)  # until the system has taken its memory and closed its pipes

    with caplog.at_level(logging.WARNING):
        assert digests(a_loader(source, stop_step=40, workers=2), kill) == expected
    assert "the process that starts data workers was ended; starting the 2 workers again" in caplog.text
    wait_until_gone(orphans)


def test_the_fork_server_leaves_signals_to_the_run():
    """Launchers send them to all processes of a run, and so does a terminal."""
    code = (
        "import signal\nfrom multiprocessing import forkserver, resource_tracker\n"
        "from ijepa_scale.data import workers\n"
        "workers._start_server()\nprint(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))\n"
        "for pid in (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid):\n"
        "    print(open(f'/proc/{pid}/status').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("[]\n"), "this process itself takes them"
    masks = re.findall(r"SigBlk:\s*(\w+)\nSigIgn:\s*(\w+)", done.stdout)
    assert len(masks) == 2
    for blocked, ignored in masks:
        spared = int(blocked, 16) | int(ignored, 16)
        assert [number.name for number in SIGNALS if not spared >> (number - 1) & 1] == []


class Deadly(Dataset):
    """Ends its worker on item 3, every time."""

    def __getitem__(self, item):
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


@pytest.mark.parametrize(("restarts", "said"), [(0, "and data.worker_restarts is 0"), (1, "after 1 restarts")])
def test_beyond_the_limit_there_is_one_line(restarts, said):
    set_recovery(Recovery(restarts=restarts))
    delivered = []
    with pytest.raises(DataError, match=f"ended by SIGKILL, as when memory runs out, {said}; lower the") as caught:
        delivered.extend(ordered_loader(Deadly(), range(8), workers=2, prefetch=2))
    assert "\n" not in str(caught.value) and delivered in ([], [0], [0, 1], [0, 1, 2])
    assert not workers()


def test_outside_training_workers_may_take_any_time_and_no_setting_is_named(monkeypatch, caplog):
    process = data_workers._Process()
    monkeypatch.setattr(data_workers, "_process", process)
    assert process.recovery.timeout_s == 0
    with pytest.raises(DataError, match="after 3 restarts; lower the number of workers or give the job more") as caught:
        list(ordered_loader(Deadly(), range(8), workers=1, prefetch=1))
    said = [record.getMessage() for record in caplog.records]
    assert "(3 of 3 times)" in said[-1]
    assert not any("data." in text for text in [str(caught.value), *said])


class Slow(Dataset):
    """Takes 4 s for an item, and shows work if so wished."""

    def __init__(self, shows):
        self.shows = shows

    def __getitem__(self, item):
        for _ in range(40):
            time.sleep(0.1)
            if self.shows:
                show_work()
        return item


def test_an_item_may_take_longer_than_the_timeout_while_work_is_shown(caplog):
    set_recovery(Recovery(restarts=0, timeout_s=2.0))
    assert list(ordered_loader(Slow(True), [7], workers=2, prefetch=1)) == [7]
    assert not caplog.records
    with pytest.raises(DataError, match=r"gave nothing for \d s .* or raise data.worker_timeout \(2 s\) if an item"):
        list(ordered_loader(Slow(False), [7], workers=1, prefetch=1))


def test_restarts_are_counted_over_all_loaders():
    set_recovery(Recovery(restarts=1))
    for said in ("after 1 restarts", "after 1 restarts"):
        with pytest.raises(DataError, match=said):
            list(ordered_loader(Deadly(), range(8), workers=1, prefetch=1))


class HalfSent(Dataset):
    """Returns items larger than a pipe; the first worker that is asked for item 2 is killed while it sends that."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __getitem__(self, item):
        if item == 2:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self.folder}/killed", os.O_CREAT | os.O_EXCL))
                worker = os.getpid()
                if not os.fork():  # a second process, since this one is about to send
                    time.sleep(1.5)
                    if os.getppid() == worker:
                        os.kill(worker, signal.SIGKILL)
                    os._exit(0)
        return bytes([item]) * (8 << 20)


def test_an_item_that_was_half_sent_is_done_again(tmp_path):
    items = iter(ordered_loader(HalfSent(tmp_path), range(6), workers=1, prefetch=6))
    found = [next(items)]
    time.sleep(4)  # item 1 is being sent, so that 2 is behind it in the same pipe, when the worker is killed
    assert [item[0] for item in [*found, *items]] == list(range(6))


class DiesWithLocks(Dataset):
    """Is killed once, at item 3, while it holds every lock and semaphore that processes share."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __getitem__(self, item):
        if item == 3:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(f"{self.folder}/killed", os.O_CREAT | os.O_EXCL))
                shared = [found for found in gc.get_objects() if isinstance(found, synchronize.SemLock)]
                held = sum(bool(lock.acquire(timeout=1)) for lock in shared)
                Path(self.folder, "held").write_text(str(held))
                os.kill(os.getpid(), signal.SIGKILL)
        return item


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_with_locks_keeps_nobody_waiting(tmp_path, workers):
    assert list(ordered_loader(DiesWithLocks(tmp_path), range(8), workers=workers, prefetch=2)) == list(range(8))
    assert int((tmp_path / "held").read_text()) >= 2  # at least those of its two queues


def test_the_callers_own_errors_are_raised_as_they_are():
    with pytest.raises(ZeroDivisionError):
        list(ordered_loader(Failing(ZeroDivisionError), range(3), workers=1, prefetch=1))
    with pytest.raises(RuntimeError, match="mine"):
        list(ordered_loader(Failing(RuntimeError), range(3), workers=1, prefetch=1))


class Failing(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __getitem__(self, item):
        raise self.kind("mine")


def test_restarts_leave_the_global_generator_alone(tmp_path):
    source = a_source(tmp_path)
    after = []
    for kills in (0, 2):
        torch.manual_seed(0)
        digests(a_loader(source, workers=1), kills_at_random_moments(1, [signal.SIGKILL], kills))
        after.append(torch.rand(3).tolist())
    assert after[0] == after[1]


def test_evaluation_goes_on_after_a_kill(tmp_path):
    source = a_source(tmp_path)
    ids = np.arange(source.num_samples)
    expected = [batch.images.clone() for batch in EvalReader(source, (16, 16), ids=ids, batch_size=4)]
    found = []
    for number, batch in enumerate(EvalReader(source, (16, 16), ids=ids, batch_size=4, workers=2)):
        found.append(batch.images.clone())
        if number == 2:
            os.kill(workers()[0].pid, signal.SIGKILL)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_stream_says_that_it_begins_again(tmp_path, caplog):
    a_source(tmp_path)
    options = {"seed": 0, "stop_step": 20, "workers": 2, "max_bad_fraction": 1.0}
    source = StreamSource(str(tmp_path))
    loader = TrainLoader(source, StreamOrder(8, 5), AugmentConfig(), (16, 16), **options)

    def kill(number):
        if number == 4:
            os.kill(workers()[0].pid, signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        assert [found[0] for found in digests(loader, kill)] == list(range(20))
    assert "again; the stream begins new passes over its shards, so samples may repeat" in caplog.text


@pytest.mark.parametrize("stopped", [False, pytest.param(True, marks=pytest.mark.long)])
def test_an_abandoned_loader_leaves_no_process(tmp_path, stopped):
    source = a_source(tmp_path)
    batches = iter(a_loader(source, workers=2))
    next(batches)
    pids = [worker.pid for worker in workers()]
    assert len(pids) == 2
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)
    batches.close()
    wait_until_gone(pids)
    assert batches_of(a_loader(source, workers=1, stop_step=2))  # others start as ever
