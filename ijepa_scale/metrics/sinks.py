"""Writes rows of numbers: to a JSON-lines file always, and to TensorBoard and others as configured.

Only process 0 writes; the others get a `Sinks` without members. Other sinks have their own file and one line in
`registry.SINKS`. Must not know what the numbers mean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from ijepa_scale.config import LoggingConfig
from ijepa_scale.errors import ConfigError, UserError
from ijepa_scale.metrics.own_time import SLOWEST
from ijepa_scale.metrics.stored_rows import describe, rows_and_broken, set_aside
from ijepa_scale.registry import SINKS

logger = logging.getLogger(__name__)

JSONL_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
BLOCK_NORM = "grad_norm_"  # of one block
HEALTH = ("feature_std", "rank_me", "lidar", "relative_loss", "context_cosine", "health_loss")
_GROUPS = {
    "speed": ("data_wait_ms", "step_ms", "images_per_s", "mfu", "peak_bytes", *SLOWEST),
    "schedule": ("lr", "weight_decay", "momentum", "epoch", "images_seen"),
    "masks": ("context_tokens", "target_tokens"),
    "evaluate": tuple(f"{name}{first}" for name in ("knn", "linear") for first in ("", "_untrained", "_start")),
    "health": (*HEALTH, "alarm"),
}


class Sink(Protocol):
    """Writes rows, each of which has a `step`.

    A registered sink has a class attribute `Config` and is built as `(config, folder, *, drop_from, run)`: its section,
    the run's folder, the first step that a resumed run repeats (0 or None in a new run), and the run's configuration as
    plain values. One that shows pictures has a method `picture`, as `TensorBoardSink` has.
    """

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row."""

    def close(self) -> None:
        """Writes buffered rows and releases resources."""


def _finite(value: Any) -> Any:
    """Returns None for NaN and infinities, which JSON can't hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlSink:
    """Appends rows to `path`, one JSON object per line, each in one write.

    First removes rows with step >= `drop_from`, through a temporary file and a rename, so that a run that starts again
    (0) or resumes after k steps (k + 1) has each step once. None keeps all rows. Broken lines, which a crash or another
    program has left, move into `metrics.broken.jsonl`. Rows that the disk doesn't take wait for the next one; `close`
    tries a last time.
    """

    name = JSONL_NAME

    def __init__(self, path: str | Path, drop_from: int | None = None) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows, broken = rows_and_broken(self._path)
        if broken:
            aside = set_aside(self._path, broken)
            logger.warning("%s: %s: moved to %s", self._path, describe(broken), aside.name)
        if rows or broken:
            self._rewrite([row for row in rows if drop_from is None or row["step"] < drop_from])
        self._file = self._path.open("ab", buffering=0)
        self._end = self._file.tell()  # of the last whole row
        self._waiting: list[bytes] = []

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends the row, after those that wait. NaN and infinities become null.

        Raises:
            OSError: the disk doesn't take it; it waits.
        """
        line = json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False)
        self._waiting.append(line.encode() + b"\n")
        self._append()

    def _append(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            if self._file.write(line) != len(line):  # a part only: the disk is full
                self._file.truncate(self._end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._end += len(line)
            del self._waiting[0]

    def close(self) -> None:
        """Writes rows that wait, and closes the file.

        Raises:
            OSError: the disk doesn't take them; they are lost.
        """
        try:
            self._append()
        finally:
            self._file.close()


class TensorBoardSink:
    """Writes the numbers of each row as TensorBoard scalars, in groups.

    Hides what an earlier run wrote for steps >= `drop_from`. `run` is the run's configuration, written as text.

    Raises:
        ConfigError: the folder's path isn't UTF-8.
    """

    def __init__(self, folder: str | Path, drop_from: int | None = None, run: Mapping[str, Any] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imported here because it takes 2 s

        self._open = partial(SummaryWriter, str(folder))
        try:
            self._writer: SummaryWriter | None = self._open(purge_step=drop_from)
        except UnicodeEncodeError:
            raise ConfigError(
                f"TensorBoard can't write into {folder}, whose name isn't UTF-8; set another folder, or "
                "logging.tensorboard=false"
            ) from None
        self._tags = {name: f"{group}/{name}" for group, names in _GROUPS.items() for name in names}
        if run is not None:
            text = yaml.safe_dump(dict(run), sort_keys=False, allow_unicode=True)
            self._writer.add_text("configuration", f"```yaml\n{text}```", drop_from or 0)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes each number of the row.

        Raises:
            OSError: the disk doesn't take it, or some row before; the next row begins a new file.
        """
        with self._writing() as writer:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    group = "gradients" if name.startswith(BLOCK_NORM) else "train"
                    writer.add_scalar(self._tags.get(name, f"{group}/{name}"), value, row["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """Writes a picture, a PNG.

        Raises:
            OSError: as `write`.
        """
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
        with self._writing() as writer:
            writer.add_image(f"pictures/{name}", pixels, step, dataformats="HWC")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        """Yields the writer. Closes it after an error, since it writes nothing more; the next call opens another."""
        if self._writer is None:
            self._writer = self._open()
        try:
            yield self._writer
        except OSError:
            broken, self._writer = self._writer, None
            with contextlib.suppress(OSError):
                broken.close()
            raise

    def close(self) -> None:
        """Writes buffered rows."""
        if self._writer is not None:
            self._writer.close()


class Sinks:
    """Writes each row to every member. As a context manager, it closes them.

    What a member can't write, as on a full disk, is logged once until it can again, and never ends a run.
    """

    def __init__(self, members: Iterable[Sink] = ()) -> None:
        self._members = list(members)
        self._failing: set[int] = set()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes the row to every member."""
        for member in self._members:
            self._try(member, row["step"], partial(member.write, row))

    def picture(self, name: str, path: Path, step: int) -> None:
        """Hands a picture, a PNG, to the members that show pictures."""
        for member in self._members:
            if (show := getattr(member, "picture", None)) is not None:
                self._try(member, step, partial(show, name, path, step))

    def _try(self, member: Sink, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if id(member) not in self._failing:
                logger.error("%s: step %d isn't written (%s); training goes on", _name(member), step, error)
            self._failing.add(id(member))
        else:
            if id(member) in self._failing:
                logger.warning("%s is written again from step %d on", _name(member), step)
            self._failing.discard(id(member))

    def close(self) -> None:
        """Closes every member, the others too if one fails."""
        with contextlib.ExitStack() as stack:
            for member in reversed(self._members):
                stack.callback(_close, member)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(member: Sink) -> None:
    try:
        member.close()
    except OSError as error:
        logger.error("%s: the last rows aren't written (%s)", _name(member), error)


def _name(member: Sink) -> str:
    return getattr(member, "name", type(member).__name__.removesuffix("Sink"))


def open_sinks(
    folder: str | Path, *, rank: int, logging: LoggingConfig, drop_from: int | None, run: Mapping[str, Any]
) -> Sinks:
    """Returns the sinks of a run on rank 0: `metrics.jsonl`, `tensorboard/` if enabled, and `logging.sinks`.

    Raises:
        ConfigError: a sink is unknown, or its package isn't installed.
    """
    if rank != 0:
        return Sinks()
    folder = Path(folder)
    members: list[Sink] = [JsonlSink(folder / JSONL_NAME, drop_from)]
    if logging.tensorboard:
        members.append(TensorBoardSink(folder / TENSORBOARD_NAME, drop_from, run))
    for name, config in logging.sinks.items():
        try:
            members.append(SINKS.get(name)(config, folder, drop_from=drop_from, run=run))
        except UserError:
            raise
        except Exception as error:  # whatever the service's client raises
            said = str(error).strip().splitlines() or ["no message"]
            raise ConfigError(
                f"logging.sinks.{name} can't be opened ({type(error).__name__}: {said[0]}); correct its settings or "
                f"the service's, or remove it with logging.sinks.{name}=false"
            ) from error
    return Sinks(members)


def kept_id(path: Path, *, resumed: bool, make: Callable[[], str]) -> str:
    """Returns the id of this run in a tracking service: read from `path` if resumed, else made and written there."""
    if resumed and path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = make()
    path.write_text(name + "\n", encoding="utf-8")
    return name
