"""Ends a run that hangs, and says which process holds it up. Must not know any kind of training.

The main thread says what it does by setting an attribute, which costs nothing. Threads of each process look at it, and
once no step has ended for `engine.hang_timeout`, they write the stacks of their process into the run's folder, compare
what the others have written, and end the process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

from ijepa_scale import terminal
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.world import World
from ijepa_scale.train import hang_reports
from ijepa_scale.train.hang_reports import DATA, Identity, Report

FOLDER = "stacks"
_STEP, _ENDING = "step", "ending"
_TIMED = (DATA, _STEP)
_TICK = (0.05, 5.0)  # seconds between two looks, least and most
_GRACE = (2.0, 60.0)  # seconds, least and most, that others have to answer; network file systems show files late
_SAYING_S = 5.0  # for the last words, since what reads standard error may hang too


class Beat(NamedTuple):
    """What the main thread does. Each is a new object, by which progress is seen."""

    phase: str
    step: int  # the one that is taken, or whose data is waited for


class Watchdog:
    """Watches one process of a run.

    The first step, saves and evaluations may take their time. There only a process that answers none of the others ends
    the run, after twice the timeout.
    """

    def __init__(self, folder: Path, world: World, timeout_s: float) -> None:
        """`folder` is the run's. With a timeout of 0 nothing is watched."""
        self._folder, self._world, self._timeout_s = folder, world, timeout_s
        self.tick_s = min(max(timeout_s / 20, _TICK[0]), _TICK[1])
        self._grace_s = min(max(timeout_s / 10, _GRACE[0]), _GRACE[1])
        self._beat = Beat("starting", 0)
        self._done = threading.Event()
        self._seen = self._beat, 0.0  # and the seconds since it was first seen
        self._talked_at = 0.0  # time.monotonic(), when the files of the others were looked at last
        self._asked_at: float | None = None  # when this process asked the others
        self._written: tuple[Beat, bool] | None = None  # what the report of this process says now
        self._written_at, self._count_written = 0.0, 0  # time.monotonic(), and how many reports there were
        self._compared_at = 0.0  # time.monotonic(), when this process read the reports of the others last
        self._heard: dict[int, tuple[int, float]] = {}  # count of each other's last report, and seconds since it came
        self._identities: list[Identity] = []

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, and notes whether the main thread waits for one or takes a step."""
        batches = iter(loader)
        batch = next(batches, None)
        while batch is not None:
            step = batch.step
            yield batch
            self._beat = Beat(DATA, step + 1)
            batch = next(batches, None)
            self._beat = Beat(_STEP if batch is not None else _ENDING, step + 1)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Doesn't count the time inside, nor after an error, which ends the run."""
        before = self._beat
        self._beat = Beat(phase, before.step)
        yield
        self._beat = Beat(*before)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while inside. Communicates when it is entered."""
        if not self._timeout_s:
            yield
            return
        self._identities = cast(list[Identity], self._world.gather_objects(Identity.own()))
        started = cast(str, self._world.broadcast_object(time.strftime("%Y%m%d-%H%M%S")))
        self._stacks = self._folder / FOLDER / started
        self._talked_at = time.monotonic()
        threads = [
            threading.Thread(target=target, name=f"watchdog {target.__name__.strip('_')}", daemon=True)
            for target in (self._count, self._talk)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join(self._grace_s)

    def _count(self) -> None:
        """Counts the seconds without progress. Touches no file, since those may be what hangs."""
        before = time.monotonic()
        while not self._done.wait(self.tick_s):
            now, beat = time.monotonic(), self._beat
            passed, before = min(now - before, self.tick_s + 1), now  # a machine that slept, or Ctrl-Z, doesn't count
            self._seen = beat, self._seen[1] + passed if beat is self._seen[0] else 0.0
            if self._hangs(beat) and now - self._talked_at > 2 * self._grace_s:
                self._end(f"{self._folder} doesn't answer, as {_doing(beat)}")

    def _is_idle(self, beat: Beat) -> bool:
        seen, seconds = self._seen
        return beat is seen and seconds >= self._timeout_s and beat.phase != _ENDING

    def _hangs(self, beat: Beat) -> bool:
        return self._is_idle(beat) and beat.phase in _TIMED

    def _talk(self) -> None:
        """Reports, and ends the process once it is plain that the run hangs."""
        while not self._done.wait(self.tick_s):
            self._talked_at, beat = time.monotonic(), self._beat
            asks = self._is_idle(beat) if self._world.size > 1 else self._hangs(beat)
            try:
                if asks or self._written or self._stacks.exists():
                    self._compare(beat, asks)
            except OSError as error:
                if self._hangs(beat) and self._seen[1] > self._timeout_s + self._grace_s:
                    told = f"{self._stacks} can't be used ({error.strerror})"
                    self._end(f"process {self._world.rank} was {_doing(beat)}; the others are unknown, as {told}")

    def _compare(self, beat: Beat, asks: bool) -> None:
        rank = self._world.rank
        others = hang_reports.read(self._stacks)
        others.pop(rank, None)
        others = self._renewed(others)
        if not asks and not any(other.asks for other in others.values()):
            hang_reports.withdraw(self._stacks, rank)  # the run goes on
            self._written = self._asked_at = None
            return
        hangs = asks and beat.phase in _TIMED
        own = hang_reports.report_of(*beat, asks=asks, hangs=hangs, count=self._count_written)
        changed = self._written is None or self._written[0] is not beat or self._written[1] != asks
        if changed or time.monotonic() - self._written_at > self._grace_s / 2:
            hang_reports.write(self._stacks, rank, own)
            self._written, self._written_at = (beat, asks), time.monotonic()
            self._count_written += 1
        if not asks:
            self._asked_at = None
            return
        self._asked_at = self._asked_at or time.monotonic()
        waited_s, silent = time.monotonic() - self._asked_at, len(others) < self._world.size - 1
        # one that answers and doesn't hang may be in a save, and the others wait for it
        plain = hangs and all(other.hangs for other in others.values()) and (not silent or waited_s >= self._grace_s)
        # the main thread may have gone on just now
        if self._beat is beat and (plain or (silent and waited_s >= max(self._timeout_s, self._grace_s))):
            self._judge({**others, rank: own})

    def _renewed(self, others: dict[int, Report]) -> dict[int, Report]:
        """Returns the reports that their processes still renew; one that stopped after its answer is silent too."""
        now = time.monotonic()
        passed, self._compared_at = min(now - self._compared_at, 2 * self.tick_s), now
        for rank, report in others.items():
            count, seconds = self._heard.get(rank, (-1, 0.0))
            self._heard[rank] = report.count, 0.0 if report.count != count else seconds + passed
        limit = 2 * max(self._timeout_s, self._grace_s)
        return {rank: report for rank, report in others.items() if self._heard[rank][1] < limit}

    def _judge(self, reports: dict[int, Report]) -> None:
        said = hang_reports.blame(reports, self._identities)
        try:
            os.close(os.open(self._stacks / "said", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            said = ""
        self._end(said)

    def _end(self, why: str) -> None:
        """Ends the process at once. Says why, unless that is empty."""
        line = (
            f"no step has ended for {self._timeout_s:g} s (engine.hang_timeout): {why}; the stacks are in "
            f"{self._stacks}; start the same command again to go on from the last checkpoint"
        )
        if why:
            terminal.at_most(_SAYING_S, lambda: terminal.report(line, f"error (process {self._world.rank})"))
        terminal.at_most(_SAYING_S, hang_reports.end_stopped_helpers)
        os._exit(terminal.HANG_CODE)


def _doing(beat: Beat) -> str:
    return f"waiting for the data of step {beat.step}" if beat.phase == DATA else f"in step {beat.step}"
