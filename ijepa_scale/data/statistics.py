"""The file of the channels' means and standard deviations next to a data set: where it lies, and what it says.

`launch/shards.py stats` writes it. A run whose normalisation is left open reads it, and refuses one of other data.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.listing import STATISTICS
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.errors import DataError
from ijepa_scale.new_file import new_file

_VERSION = 1


@dataclass(frozen=True)
class Statistics:
    """What was measured of a set of images, in units of the type's white: 255, 65535, or 1 for floats."""

    channels: int
    dtype: str
    images: int
    pixels: int  # of all images together
    fingerprint: str  # of the list of images
    mean: tuple[float, ...]
    std: tuple[float, ...]


def statistics_path(data: str | None) -> Path | None:
    """Returns where the statistics of the images lie that `data.train` names; None where there is no such place.

    They are in the folder of images or shards. Those of a single file, like a list, are next to it under its name.

    Raises:
        DataError: it is a pattern that matches nothing.
    """
    if data is None or scheme_of(data) is not None:
        return None
    if os.path.isdir(data):
        return Path(data) / STATISTICS
    if os.path.isfile(data) and not data.endswith(".tar"):
        return Path(f"{data}.{STATISTICS}")
    return expand(data)[0].parent / STATISTICS


def write_statistics(found: Statistics, path: Path) -> None:
    """Writes the statistics atomically.

    Raises:
        DataError: the file can't be written.
    """
    try:
        with new_file(path) as temporary:
            temporary.write_text(json.dumps({"version": _VERSION, **asdict(found)}, indent=1) + "\n")
    except OSError as error:
        raise DataError(
            f"{path} can't be written ({error.strerror}); make room, or fix its folder's permissions, or set "
            "augment.mean and augment.std to what was measured"
        ) from None


def read_statistics(path: Path) -> Statistics:
    """Returns the statistics in a file.

    Raises:
        DataError: it isn't there, or isn't such a file.
    """
    try:
        content = parse_json(path.read_bytes())
        if content.pop("version") != _VERSION:
            raise ValueError("another version")
        mean, std = (tuple(float(value) for value in content.pop(name)) for name in ("mean", "std"))
        found = Statistics(**content, mean=mean, std=std)
        sound = all(map(math.isfinite, found.mean)) and all(0 < value < math.inf for value in found.std)
        if not sound or {len(found.mean), len(found.std)} != {found.channels}:
            raise ValueError(f"{found.channels} channels, but mean {found.mean} and std {found.std}")
        return found
    except FileNotFoundError:
        raise DataError(f"there is no {path}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise DataError(f"{path} isn't a file of pixel statistics ({error})") from None


def normalisation_of(
    data: DataConfig, *, pixels: PixelFormat, fingerprint: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of each channel, as measured of the images that `data.train` names.

    Raises:
        DataError: they weren't measured, or of other images; the message has the command that does.
    """
    path = None if data.reader == "stream" else statistics_path(data.train)
    if path is None:
        raise DataError(
            f"augment.mean and augment.std are null, and no measured ones can lie next to data.train={data.train} of "
            f"reader {data.reader}; give {pixels.channels} numbers each"
        )
    members = ((name, getattr(data, f"{name}_member")) for name in ("image", "label"))
    words = [
        "python launch/shards.py stats", shlex.quote(str(data.train)), f"--reader {data.reader}",
        f"--channels {pixels.channels} --pixels {pixels.dtype}",
        *(f"--{name}-member {member}" for name, member in members if member is not None),
    ]  # fmt: skip
    remedy = (
        f"run `{' '.join(words)}`, or give augment.mean and augment.std with {pixels.channels} "
        f"number{'s' * (pixels.channels > 1)} each"
    )
    try:
        found = read_statistics(path)
    except DataError as error:
        raise DataError(f"augment.mean and augment.std are null and {error}; {remedy}") from None
    if (found.channels, found.dtype) != (pixels.channels, pixels.dtype):
        measured = f"{found.channels} of {found.dtype}"
        raise DataError(f"{path} was measured for {measured}, and images have {pixels}; {remedy}")
    if found.fingerprint != fingerprint:
        raise DataError(f"{path} was measured on another list of images than {data.train} has now; {remedy}")
    return found.mean, found.std


__all__ = [
    "STATISTICS", "Statistics", "normalisation_of", "read_statistics", "statistics_path", "write_statistics",
]  # fmt: skip
