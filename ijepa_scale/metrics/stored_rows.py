"""Reads the rows of a JSON-lines file, and tells its broken lines from them. Must not know what the numbers mean."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import DataError
from ijepa_scale.regular_file import check_regular

logger = logging.getLogger(__name__)

_LONGEST = 1 << 20  # bytes of a row; one of this package has some thousand
_SHOWN = 5  # broken lines that a message names


@dataclass(frozen=True)
class Broken:
    """A line that is no row, and where it is: line number from 1, first byte, number of bytes, what is wrong."""

    number: int
    start: int
    length: int
    problem: str


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSON-lines file, [] if there is none. Leaves broken lines out, and warns of them.

    Raises:
        DataError: the file can't be read.
    """
    try:
        rows, broken = rows_and_broken(Path(path))
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); fix its permissions, or move it") from None
    if broken:
        logger.warning("%s: %s: left out", path, describe(broken))
    return rows


def rows_and_broken(path: Path) -> tuple[list[dict[str, Any]], list[Broken]]:
    """Returns the rows of a file, and its lines that aren't a JSON object with a finite step. Both [] without a file.

    Raises:
        OSError: it can't be read.
    """
    rows: list[dict[str, Any]] = []
    broken: list[Broken] = []
    with contextlib.suppress(FileNotFoundError):
        check_regular(path)
        with path.open("rb") as file:
            start = 0
            for number in itertools.count(1):
                line = file.readline(_LONGEST)
                if not line:
                    break
                length = len(line) + (0 if line.endswith(b"\n") else _rest(file))
                try:
                    rows.append(_row(line, length))
                except ValueError as error:
                    broken.append(Broken(number, start, length, str(error)))
                start += length
    return rows, broken


def _rest(file: BinaryIO) -> int:
    """Returns the number of bytes to the end of the line, and goes there."""
    count = 0
    while piece := file.readline(_LONGEST):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def _row(line: bytes, length: int) -> dict[str, Any]:
    if length > len(line):
        raise ValueError(f"{length} bytes long")
    try:
        row = parse_json(line)
    except UnicodeDecodeError:
        raise ValueError(f"no UTF-8: {_start_of(line)}") from None
    except ValueError:
        what = "no JSON" if line.endswith(b"\n") else "cut off"
        raise ValueError(f"{what}: {_start_of(line)}") from None
    if not isinstance(row, dict) or not is_number(row.get("step")):
        raise ValueError(f"no JSON object with a step: {_start_of(line)}")
    return row


def _start_of(line: bytes) -> str:
    return repr(line[:40].decode(errors="replace"))


def describe(broken: list[Broken]) -> str:
    """Returns the numbers of broken lines, and what is wrong with the first ones."""
    shown = "; ".join(f"line {each.number} is broken ({each.problem})" for each in broken[:_SHOWN])
    return shown + (f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else "")


def set_aside(path: Path, broken: Iterable[Broken]) -> Path:
    """Appends the broken lines of a file to one next to it, as they are, and returns its path. The file stays.

    Raises:
        OSError: they can't be copied.
    """
    aside = path.with_name(f"{path.stem}.broken{path.suffix}")
    with path.open("rb") as file, aside.open("ab") as copy:
        for each in broken:
            file.seek(each.start)
            for piece in _pieces(file, each.length):
                copy.write(piece)
                ends = piece.endswith(b"\n")
            copy.write(b"" if ends else b"\n")
        copy.flush()
        os.fsync(copy.fileno())
    return aside


def _pieces(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length > 0 and (piece := file.read(min(length, _LONGEST))):
        length -= len(piece)
        yield piece


def is_number(value: Any) -> bool:
    """Returns whether a value of a row is a number that a float holds, and finite."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of over 308 digits
        return False
