"""Ends a run whose processes can't hear one another any more, and says which. Must not know any kind of training.

A thread of each process says every few seconds in the run's store that the process is there, and reads what others say:
process 0 all of them, and the others process 0, which publishes what it finds. That thread may wait for minutes in a
dead connection, so another one judges by the time since somebody was last heard. The step knows nothing of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import psutil
import torch.distributed as dist

from ijepa_scale import terminal
from ijepa_scale.engine.world import World
from ijepa_scale.escapes import one_line
from ijepa_scale.stopping import Stopped
from ijepa_scale.train.hang_reports import Identity, named

logger = logging.getLogger(__name__)

_KEY = "link/{}"
_BEATS = 10  # of a process, in the time after which it counts as gone
_INTERVAL_S = (0.02, 5.0)  # between two of them, least and most
_BROKEN_BEATS = 3  # missed beats that make a process the suspect once a connection has broken
_UNWIND_BEATS = 3  # for the main thread to end by itself, after another process has failed
_FIRST_S = 5.0  # for a process that has failed to print its error and end before the others do
_LONGEST = 2000  # characters that one process tells the others of its error
_AGAIN = "start the same command again to go on from the last checkpoint"

# What a process says of itself.
_ALIVE = "alive"
_BROKEN = "broken"  # its connection to another process broke
_FAILED = "failed"  # process `about` has ended with an error, or is gone
_SILENT = "silent"  # process `about` isn't heard; of process 0 only
_LEFT = "left"
_FINDINGS = (_FAILED, _SILENT)


class Word(NamedTuple):
    """What a process says with a beat. Findings of process 0 end all processes."""

    beat: int = 0
    state: str = _ALIVE
    about: int = -1  # rank
    said: str = ""
    code: int = 0

    def packed(self) -> str:
        """Returns it as JSON."""
        return json.dumps(self)

    @classmethod
    def unpacked(cls, text: bytes) -> Word:
        """Returns what `packed` wrote."""
        return cls(*json.loads(text))


class LinkWatch:
    """Watches the links between one process of a run and the others."""

    def __init__(self, world: World, timeout_s: float) -> None:
        """With a timeout of 0, a single process or a world without a store, nothing is watched."""
        self._world, self._timeout_s = world, timeout_s
        self.interval_s = min(max(timeout_s / _BEATS, _INTERVAL_S[0]), _INTERVAL_S[1])
        self._word = Word()
        self._told = Word()  # the last one that has reached the store
        self._heard: dict[int, tuple[bytes, Word, float]] = {}  # packed, unpacked, and the clock when it was new
        self._clock = 0.0  # seconds; stands still while the machine sleeps, or all of the run is stopped
        self._wake, self._done = threading.Event(), threading.Event()
        self._finding: Word | None = None
        self._found_at = 0.0
        self._identities: list[Identity] = []
        self._ending = threading.Lock()  # held from the moment when a thread ends the process

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while inside. Communicates when it is entered.

        Where a connection breaks inside, it ends the process, and says which other one is gone. Any other error is
        passed on once the others know of it.
        """
        if not self._timeout_s or self._world.size == 1:
            yield
            return
        if self._world.store is None:
            logger.info("links between the processes aren't watched: the process group was there before the run")
            yield
            return
        self._world.store.set(_KEY.format(self._world.rank), Word().packed())
        self._identities = cast(list[Identity], self._world.gather_objects(Identity.own()))  # all have set their keys
        self._heard = {rank: (b"", Word(), 0.0) for rank in self._listens_to()}
        threads = [
            threading.Thread(target=target, name=f"links {target.__name__.strip('_')}", daemon=True)
            for target in (self._count, self._talk)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        except Stopped:  # on every process
            self._leave(threads)
            raise
        except BaseException as error:
            if _is_of_connection(error):
                self._explain()
                logger.error("a connection to another process broke, but all processes are still heard of")
            self._confess(error)
            self._leave(threads)
            raise
        self._leave(threads)

    def _listens_to(self) -> list[int]:
        """Returns whose words this process reads; its own too, to know whether the store answers."""
        return list(range(self._world.size)) if self._world.is_main else [0, self._world.rank]

    # The thread that talks.

    def _talk(self) -> None:
        store: Any = None
        for count in itertools.count(1):
            last, word = self._done.is_set(), self._word
            try:
                if store is None:  # a connection of its own, since calls may block it
                    store = cast(Any, self._world.store).clone()
                store.set(_KEY.format(self._world.rank), word._replace(beat=count).packed())
                ranks = self._listens_to()
                for rank, text in zip(ranks, store.multi_get([_KEY.format(rank) for rank in ranks]), strict=True):
                    if text != self._heard[rank][0]:
                        self._heard[rank] = text, Word.unpacked(text), self._clock
                self._told = word
            except RuntimeError:  # a broken connection
                store = None
            # one that has left need not be heard any more, and the store may end with process 0
            if last or (self._told.state == _LEFT and not self._world.is_main):
                return
            self._wake.wait(self.interval_s if word.state == _ALIVE else self.interval_s / _BEATS)
            self._wake.clear()

    def _say(self, word: Word) -> None:
        """Says it at once; returns without waiting for it."""
        self._word = word
        self._wake.set()

    # The thread that judges.

    def _count(self) -> None:
        tick_s = self.interval_s / 4
        before = time.monotonic()
        while not self._done.wait(tick_s):
            now = time.monotonic()
            self._clock += min(now - before, self.interval_s)
            before = now
            if self._finding is None:
                self._find()
            finding = self._finding
            if finding is None:
                continue
            if finding.state == _SILENT or self._clock - self._found_at > _UNWIND_BEATS * self.interval_s:
                self._end(finding)

    def _find(self) -> None:
        """Finds out whether the run has to end."""
        finding = self._judge_all() if self._world.is_main else self._judge_main()
        if finding is not None:
            self._found_at, self._finding = self._clock, finding
            self._say(finding if self._world.is_main else Word(state=_LEFT))

    def _judge_all(self) -> Word | None:
        words = {rank: word for rank, (_, word, _) in self._heard.items()}
        failed = [(word.about != rank, rank) for rank, word in words.items() if word.state == _FAILED]
        if failed:  # what a process says of itself is better than what others suspect
            return words[min(failed)[1]]
        broken = any(word.state == _BROKEN for word in (self._word, *words.values()))
        present = [rank for rank, word in words.items() if word.state != _LEFT and rank != self._world.rank]
        silent = [rank for rank in present if self._age(rank) > self._limit(broken)]
        if not silent:
            return None
        # with those that will be over the limit in a moment, such as the others of the same host
        return self._silence(
            [rank for rank in present if self._age(rank) > self._limit(broken) - self.interval_s], broken
        )

    def _judge_main(self) -> Word | None:
        word = self._heard[0][1]
        if word.state in _FINDINGS:
            return word
        broken = self._word.state == _BROKEN
        return self._silence([0], broken) if word.state != _LEFT and self._age(0) > self._limit(broken) else None

    def _age(self, rank: int) -> float:
        return self._clock - self._heard[rank][2]

    def _limit(self, broken: bool) -> float:
        return min(_BROKEN_BEATS * self.interval_s, self._timeout_s) if broken else self._timeout_s

    def _silence(self, silent: list[int], broken: bool) -> Word:
        first, own = self._identities[silent[0]], self._identities[self._world.rank]
        cause = first.state()
        if first.host != own.host and self._age(self._world.rank) > _BROKEN_BEATS * self.interval_s:
            cause += f", or {own.host} is cut off"
        said = (
            f"{'a connection broke and nothing' if broken else 'nothing'} has been heard for "
            f"{self._age(silent[0]):.0f} s {'' if broken else '(engine.link_timeout) '}of "
            f"{named(silent, self._identities)}: {cause}"
        )
        return Word(state=_SILENT, about=silent[0], said=said, code=terminal.HANG_CODE)

    # How a process ends.

    def _confess(self, error: BaseException) -> None:
        """Tells the others why this process ends, and waits a moment for them to hear it."""
        rank = self._world.rank
        code = terminal.code_of(error)
        text = f"{type(error).__name__}: {error}" if code == 1 else str(error)
        said = f"{named([rank], self._identities)} has ended: {one_line(text)[:_LONGEST]}"
        word = Word(state=_FAILED, about=rank, said=said, code=code)
        self._finding = self._finding or word  # so that the other thread doesn't look for one
        self._found_at = float("inf")  # and lets this one end as it likes
        self._say(word)
        self._wait_for_the_others()

    def _explain(self) -> None:
        """Ends the process if it becomes known within a few beats why a connection broke."""
        deadline = time.monotonic() + 2 * _BROKEN_BEATS * self.interval_s
        while self._finding is None and time.monotonic() < deadline:
            gone = self._gone_from_here()
            if gone and self._word.state != _FAILED:
                said = f"{named(gone, self._identities)} {'has' if len(gone) == 1 else 'have'} ended"
                self._say(Word(state=_FAILED, about=gone[0], said=said, code=terminal.HANG_CODE))
            elif self._word.state == _ALIVE:
                self._say(Word(state=_BROKEN))
            if gone and gone[0] == 0:
                break  # nobody else will say it
            time.sleep(self.interval_s / _BEATS)
        finding = self._finding or (self._word if self._word.state == _FAILED else None)
        if finding is not None:
            self._end(finding)

    def _gone_from_here(self) -> list[int]:
        """Returns the processes of this host that have ended."""
        here = self._identities[self._world.rank].place
        return [rank for rank, other in enumerate(self._identities) if other.place == here and _has_ended(other)]

    def _wait_for_the_others(self) -> None:
        """Waits for a few beats: process 0 until the others know, since its store may end with it; others until told.

        Those that have left, that have failed themselves or that the finding is about know it.
        """
        deadline = time.monotonic() + _BROKEN_BEATS * self.interval_s

        def knows() -> bool:
            blamed = self._finding.about if self._finding else -1
            if not self._world.is_main:
                return blamed == 0 or (self._told is self._word and self._heard[0][1].state != _ALIVE)
            return self._told is self._word and all(
                word.state in (_LEFT, _FAILED) or rank in (0, blamed) or self._age(rank) > self._limit(True)
                for rank, (_, word, _) in self._heard.items()
            )

        while not knows() and time.monotonic() < deadline:
            time.sleep(self.interval_s / _BEATS / 2)

    def _leave(self, threads: list[threading.Thread]) -> None:
        """Says that this process has ended in order, or knows how another one did."""
        if self._word.state != _FAILED:
            self._say(Word(state=_LEFT))
            if self._world.is_main:
                self._wait_for_the_others()
        self._done.set()
        self._wake.set()
        for thread in threads:
            thread.join(self.interval_s)

    def _end(self, finding: Word) -> None:
        """Ends the process at once, and says why, unless another one of this host does."""
        self._ending.acquire()
        self._finding = finding
        self._say(finding if self._world.is_main else Word(state=_LEFT))
        if self._speaks(finding):
            line = f"{finding.said}; {_AGAIN}" if finding.code == terminal.HANG_CODE else finding.said
            terminal.at_most(5.0, lambda: terminal.report(line, f"error (process {self._world.rank})"))
        self._wait_for_the_others()
        self._let_it_end_first(finding)
        self._exit(finding.code)

    def _exit(self, code: int) -> None:
        os._exit(code)

    def _let_it_end_first(self, finding: Word) -> None:
        """Waits a little for a process of this host that has failed: what starts them ends all with the first."""
        at, deadline = self._identities[finding.about], time.monotonic() + _FIRST_S
        is_here = finding.about != self._world.rank and at.place == self._identities[self._world.rank].place
        while finding.state == _FAILED and is_here and not _has_ended(at) and time.monotonic() < deadline:
            time.sleep(self.interval_s / _BEATS / 2)

    def _speaks(self, finding: Word) -> bool:
        """Returns whether this process prints a finding: the first one of each host, if the host hasn't seen it."""
        here = self._identities[self._world.rank].place
        at = self._identities[finding.about]
        if at.place == here and finding.code != terminal.HANG_CODE:
            return False  # the process has printed its error itself
        others = (rank for rank, other in enumerate(self._identities) if other.place == here)
        able = (rank for rank in others if rank != finding.about and not _has_ended(self._identities[rank]))
        return next(able, self._world.rank) == self._world.rank


def _has_ended(identity: Identity) -> bool:
    try:
        process = psutil.Process(identity.pid)
        return process.create_time() != identity.created or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_of_connection(error: BaseException | None) -> bool:
    """Returns whether an error of a collective is, or has led to, this one."""
    seen = 0
    while error is not None and seen < 20:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
