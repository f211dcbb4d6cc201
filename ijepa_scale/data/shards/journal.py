"""What has been written of a set of shards so far, so that it can be finished later. Files only.

One file beside the shards, appended to and synced: the plan, then a line per shard, before the shard gets its name.
While it is open the folder is locked against a second process; when the set is whole it is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ijepa_scale.data.shards.write import PART, ShardRow, check_empty, place, sync
from ijepa_scale.data.sources.fetch import file_sha256
from ijepa_scale.errors import DataError

JOURNAL = "making.jsonl"


@dataclass(frozen=True)
class Entry:
    """A whole shard, and how far in the order of images it reaches."""

    shard: ShardRow
    next_place: int  # of the first image that comes after it
    left_out: dict[str, int]  # images between the shard before and `next_place` that are in no shard, by kind


class Journal:
    """The journal of a folder, new or continued; holds the folder until `close`.

    Raises:
        DataError: the folder holds something else, a set made by another plan, or damage; or another process has it.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._path = folder, folder / JOURNAL
        if not self._path.exists():
            check_empty(folder)
        self._file = self._path.open("a+b")
        try:
            self._lock()
            lines = self._lines()
            if lines:
                self._check_plan(lines[0], plan)
            else:
                self._append(dict(plan))
            self.entries = [self._entry(line) for line in lines[1:]]
            self._check_shards()
        except BaseException:
            self._file.close()
            raise

    @property
    def next_place(self) -> int:
        """The place in the order of images that is to be written next."""
        return self.entries[-1].next_place if self.entries else 0

    def add(self, entry: Entry) -> None:
        """Notes a shard that is whole but for its name, and gives it its name."""
        self._append(asdict(entry))
        self.entries.append(entry)
        place(self.folder, entry.shard)

    def close(self, *, whole: bool) -> None:
        """Lets go of the folder; a set that is whole needs its journal no more."""
        if whole:
            self._path.unlink()
            sync(self.folder)
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is writing into {self.folder}; let it finish, or name another folder"
            ) from None
        if not os.fstat(self._file.fileno()).st_nlink:  # finished between our opening and locking it
            raise DataError(f"folder {self.folder} already holds shards; name an empty one")

    def _lines(self) -> list[dict[str, Any]]:
        """Returns the lines; one that was being written when its process was killed is cut off."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is no object")
        except ValueError as error:
            raise self._damage(error) from None
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check_plan(self, found: dict[str, Any], plan: Mapping[str, Any]) -> None:
        other = [f"{key} {found.get(key)!r}, now {plan.get(key)!r}" for key in plan if found.get(key) != plan.get(key)]
        if other:
            raise DataError(
                f"folder {self.folder} holds a set begun with other arguments: {'; '.join(other)}; "
                "give the same ones to finish it, or name an empty folder"
            )

    def _entry(self, line: dict[str, Any]) -> Entry:
        try:
            return Entry(ShardRow(**line["shard"]), int(line["next_place"]), dict(line["left_out"]))
        except (LookupError, TypeError, ValueError) as error:
            raise self._damage(error) from None

    def _check_shards(self) -> None:
        """Names the last shard where that was still to be done, and refuses what is missing or foreign."""
        for entry in self.entries:
            shard = entry.shard
            path, part = self.folder / shard.name, self.folder / f"{shard.name}{PART}"
            if entry is self.entries[-1] and not path.exists() and part.exists():
                if part.stat().st_size == shard.bytes and file_sha256(part) == shard.sha256:
                    place(self.folder, shard)
            found = path.stat().st_size if path.exists() else None
            if found != shard.bytes:
                raise DataError(
                    f"{path} has {found or 'no'} bytes, {shard.bytes} were written; "
                    "put it back, or start again in an empty folder"
                )
        foreign = {path.name for path in self.folder.glob("*.tar")} - {entry.shard.name for entry in self.entries}
        if foreign:
            raise DataError(
                f"{self.folder / min(foreign)} isn't of the set being made there; move it away, or name another folder"
            )

    def _damage(self, error: Exception) -> DataError:
        return DataError(f"{self._path} is damaged ({error}); start again in an empty folder")


__all__ = ["JOURNAL", "Entry", "Journal"]
