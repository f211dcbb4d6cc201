"""The log of each process of a run, in the folder `logs` of the run, and all of them as one. Imports no torch.

Lines begin with the time in UTC, so that the logs of several hosts can be merged. A run that goes on appends.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ijepa_scale import environment, terminal
from ijepa_scale.errors import UserError
from ijepa_scale.stopping import Stopped

FOLDER = "logs"  # in a run folder
_PACKAGE = "ijepa_scale"
_FORM = "%(asctime)s.%(msecs)03dZ [{rank}] %(levelname)s %(name)s: %(message)s"
_TIME = "%Y-%m-%dT%H:%M:%S"
_BEGINS = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
_NAME = re.compile(r"process-\d{5,}\.log")


def log_path(folder: Path, rank: int) -> Path:
    """Returns the file of a process's log."""
    return folder / FOLDER / f"process-{rank:05d}.log"


@contextlib.contextmanager
def process_log(folder: Path, rank: int, size: int) -> Iterator[None]:
    """Appends what the package logs in this process, from INFO on, to its file, and how the run ends here.

    The file is made once something else is in the run's folder, so a run that fails before it wrote anything leaves
    nothing. Where the file can't be written, lines are lost, which is said once.
    """
    handler = _ProcessLog(log_path(folder, rank), rank)
    logger = logging.getLogger(_PACKAGE)
    before = logger.level
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    logger.addHandler(handler)
    try:
        job = environment.job()
        where = f"process {os.getpid()} on {socket.gethostname()}{f', job {job}' if job else ''}"
        handler.tell(logging.INFO, f"process {rank} of {size} begins: {where}")
        yield
        handler.tell(logging.INFO, "ends: done")
    except Stopped as stopped:
        handler.tell(logging.INFO, f"ends: {stopped}")
        raise
    except UserError as error:
        handler.tell(logging.ERROR, f"ends: {error}")
        raise
    except BaseException as error:
        handler.tell(logging.ERROR, f"ends: {type(error).__name__}: {error}", error)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        with contextlib.suppress(OSError):  # what can't be written was told
            handler.close()


class _ProcessLog(logging.FileHandler):
    """Writes records to a file, whose folder it makes; keeps them while the run's folder holds only its lock."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        form = terminal.LineFormatter(_FORM.format(rank=rank), _TIME)
        form.converter = time.gmtime
        self.setFormatter(form)
        self._kept: list[str] = []
        self._fails = False

    def tell(self, level: int, text: str, error: BaseException | None = None) -> None:
        """Writes a line that no other handler gets, with the traceback of an error."""
        trace = None if error is None else (type(error), error, error.__traceback__)
        self.handle(logging.LogRecord(f"{_PACKAGE}.run", level, "", 0, "%s", (text,), trace))

    def _open(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or keeps its line."""
        self._kept.append(self.format(record) + self.terminator)
        try:
            if self.stream is None:
                if all(name.startswith(".") for name in os.listdir(Path(self.baseFilename).parents[1])):
                    return
                self.stream = self._open()
            self.stream.write("".join(self._kept))
            self.stream.flush()
        except OSError as error:
            if not self._fails:
                text = f"{self.baseFilename} can't be written ({error.strerror}), so lines of it are lost; free space"
                terminal.report(text, "warning")
            self._fails = True
        self._kept.clear()


def merged(folder: Path) -> Iterator[str]:
    """Yields the lines of all processes of a run in the order of their times, or those of a sweep's runs in turn.

    Raises:
        UserError: there are no logs in the folder.
    """
    runs = [folder] if (folder / FOLDER).is_dir() else sorted(path.parent for path in folder.glob(f"*/{FOLDER}"))
    found = {run: [path for path in (run / FOLDER).iterdir() if _NAME.fullmatch(path.name)] for run in runs}
    if not any(found.values()):
        raise UserError(
            f"{folder} has no {FOLDER}/process-*.log; name the folder of a run that has begun, or see what its job "
            f"printed in {folder}/{FOLDER}"
        )
    for run, paths in found.items():
        if len(found) > 1:
            yield f"{run}:"
        with contextlib.ExitStack() as files:
            opened = [files.enter_context(path.open(errors="backslashreplace")) for path in sorted(paths)]
            for entry in heapq.merge(*map(_entries, opened), key=lambda entry: entry[0][:24]):
                yield from entry


def _entries(lines: Iterator[str]) -> Iterator[list[str]]:
    """Yields lines with those that belong to them, such as a traceback's."""
    entry: list[str] = []
    for line in lines:
        if entry and _BEGINS.match(line):
            yield entry
            entry = []
        entry.append(line.rstrip("\n"))
    if entry:
        yield entry
