"""The journal of an unfinished set of shards, from which an interrupted run continues.

It is one file next to the shards, appended to and synced: the plan, then one line per shard, written before the shard
gets its name. While the journal is open, the folder is locked against other processes; when the set is complete, the
journal is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.data.shards.write import PART, ShardRow, check_empty, publish
from ijepa_scale.data.sources.fetch import file_sha256
from ijepa_scale.errors import DataError
from ijepa_scale.new_file import flush

JOURNAL = "making.jsonl"


@dataclass(frozen=True)
class Entry:
    """A complete shard, and how far it reaches in the order of images."""

    shard: ShardRow
    next_position: int  # of the first image after the shard, in the order of images
    left_out: dict[str, int]  # by kind: images since the previous shard that are in no shard


class Journal:
    """The journal of a folder, new or continued. Locks the folder until `close`.

    Raises:
        DataError: the folder holds something else, a set made by another plan or a damaged one, or another process
            has locked it.
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
    def next_position(self) -> int:
        """The position, in the order of images, of the next image to write."""
        return self.entries[-1].next_position if self.entries else 0

    def add(self, entry: Entry) -> None:
        """Records a complete shard, and then gives it its name."""
        # the file format calls the position a place
        line = {"shard": asdict(entry.shard), "next_place": entry.next_position, "left_out": entry.left_out}
        self._append(line)
        self.entries.append(entry)
        publish(self.folder, entry.shard)

    def close(self, *, whole: bool) -> None:
        """Unlocks the folder, and removes the journal if the set is complete."""
        if whole:
            self._path.unlink()
            flush(self.folder)
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
        """Returns the complete lines, and removes one that was only partly written when its process was killed."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        try:
            lines = [parse_json(line) for line in whole.splitlines()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line isn't an object")
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
                f"folder {self.folder} holds a set that was started with other arguments: {'; '.join(other)}; "
                "give the same ones to finish it, or name an empty folder"
            )

    def _entry(self, line: dict[str, Any]) -> Entry:
        try:
            row, position, left_out = ShardRow(**line["shard"]), line["next_place"], line["left_out"]
            if not isinstance(row.sha256, str) or Path(row.name).name != row.name or row.name in ("", ".."):
                raise ValueError(f"{row.name!r} isn't a file next to it")
            counts = [row.bytes, row.samples, position, *left_out.values()]
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError(f"{counts} aren't counts")
            return Entry(row, position, left_out)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self._damage(error) from None

    def _check_shards(self) -> None:
        """Checks that exactly the recorded shards exist; gives the last one its name if that was interrupted."""
        for entry in self.entries:
            shard = entry.shard
            path, part = self.folder / shard.name, self.folder / f"{shard.name}{PART}"
            if entry is self.entries[-1] and not path.exists() and part.exists():
                if part.stat().st_size == shard.bytes and file_sha256(part) == shard.sha256:
                    publish(self.folder, shard)
            found = path.stat().st_size if path.exists() else None
            if found != shard.bytes:
                raise DataError(
                    f"{path} has {found or 'no'} bytes, but {shard.bytes} were written; "
                    "put it back, or start again in an empty folder"
                )
        foreign = {path.name for path in self.folder.glob("*.tar")} - {entry.shard.name for entry in self.entries}
        if foreign:
            raise DataError(
                f"{self.folder / min(foreign)} isn't part of the set being made there; move it away, or name another "
                "folder"
            )

    def _damage(self, error: Exception) -> DataError:
        return DataError(f"{self._path} is damaged ({error}); start again in an empty folder")


__all__ = ["JOURNAL", "Entry", "Journal"]
