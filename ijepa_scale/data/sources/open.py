"""Builds the data source and the sample order that a configuration names. Must not know any reader's format."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ijepa_scale.config.data import WITHOUT_MEMBERS, DataConfig, Verify
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.formats import is_image, junk
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.listing import asked_for
from ijepa_scale.data.sources.scan import Members
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.data.sources.subset import SubsetSource
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_index import expand, is_tar
from ijepa_scale.errors import DataError
from ijepa_scale.registry import SOURCES


def reader_of(data: str) -> str:
    """Returns the name of the reader that suits what a path names: a folder of images or of tars, a list, or shards.

    Raises:
        DataError: there is nothing, no reader reads it, or a folder holds both images and tars.
    """
    if asked_for(data) is not None:
        return "imagefolder"
    if os.path.isdir(data):
        try:
            names = os.listdir(data)
        except OSError as error:
            raise DataError(f"folder {data} can't be listed ({error.strerror}); fix its permissions") from None
        images, tars = (sum(kind(name) and junk(name) is None for name in names) for kind in (is_image, is_tar))
        if images and tars:
            raise DataError(
                f"folder {data} holds {images} images and {tars} tars, and which are meant isn't guessed; move one "
                "kind away, or set the reader to imagefolder or shards"
            )
        return "shards" if tars else "imagefolder"
    suffix = Path(data).suffix.lower()
    if os.path.isfile(data) and suffix in (".zip", ".parquet"):
        kind = suffix.removeprefix(".")
        raise DataError(
            f"{data} isn't read in place; write shards first: python launch/shards.py make --from {kind} --root "
            f"{shlex.quote(data)} --to SHARDS"
        )
    if os.path.isfile(data) and is_image(data):
        raise DataError(f"{data} is one image; give the folder that it is in")
    if scheme_of(data) is None and not os.path.lexists(data) and not any(mark in data for mark in "*?[{"):
        raise DataError(f"{data} doesn't exist or can't be reached; check the path")
    return "list" if suffix in (".csv", ".txt", ".lst") else "shards"


def training_source(
    data: DataConfig, image_size: tuple[int, int], channels: int = RGB8.channels
) -> SampleSource | StreamSource:
    """Returns the source of a run's training images. `image_size` and `channels` are those of synthetic images.

    Raises:
        ConfigError: `data.reader` is unknown.
        DataError: `data.train` is missing, the data can't be read, it is remote and there is no cache or only a subset
            is wanted, or the subset's file names other images.
    """
    if data.reader == "synthetic":  # the only reader that makes pixels, so it must know their format
        return SyntheticSource(data.synthetic_samples, image_size, pixels=PixelFormat(channels, data.pixels))
    if data.subset is not None and data.train is not None and scheme_of(data.train) is not None:
        raise DataError(f"data.subset needs local images, but data.train is {data.train}; copy them to a folder first")
    source = SOURCES.get(data.reader)(data, image_size)
    return source if data.subset is None else SubsetSource(source, data.subset)


def build_source(
    reader: str,
    pattern: str | Path | None,
    *,
    num_samples: int = 1_281_167,
    image_size: tuple[int, int] = (256, 256),
    members: Members | None = None,
    verify: Verify = "first_open",
) -> SampleSource:
    """Returns the samples that `reader` finds under `pattern`, for random access.

    `num_samples` and `image_size` apply to synthetic images only, `members` and `verify` to shards.

    Raises:
        ConfigError: the reader is unknown.
        DataError: the pattern is missing, remote or a folder of splits, the reader has no random access, or the data
            can't be read.
    """
    member = SOURCES.get(reader)
    if pattern is not None and scheme_of(str(pattern)) is not None:
        expand(pattern)  # raises, since these shards must be local
    section = getattr(member, "Config", DataConfig)
    train = None if pattern is None else str(pattern)
    members = Members() if members is None or reader in WITHOUT_MEMBERS else members
    data = section(
        reader=reader, train=train, batch_size=1, synthetic_samples=num_samples,
        image_member=members.image, label_member=members.label, verify=verify,
    )  # fmt: skip
    source = member(data, image_size)
    if isinstance(source, StreamSource):
        raise DataError(f"reader {reader!r} gives samples in its own order only; use shards or imagefolder here")
    chosen = getattr(source, "chosen_split", None)
    if chosen is not None:
        raise DataError(
            f"{pattern} holds splits, and which one to evaluate on isn't chosen here; give one, like {pattern}/val"
        )
    return source


def training_order(
    data: DataConfig, source: SampleSource | StreamSource, batch_size: int, *, seed: int, steps_per_epoch: int | None
) -> SampleOrder | StreamOrder:
    """Returns the order of the samples. `steps_per_epoch` sets the length of an epoch for streams only.

    Raises:
        DataError: the batch is larger than the data set, or the source is a stream and `steps_per_epoch` is None.
    """
    if isinstance(source, StreamSource):
        if steps_per_epoch is None:
            raise DataError(
                "data.reader stream: a stream has no known length; give schedule.steps_per_epoch (samples // batch)"
            )
        return StreamOrder(batch_size, steps_per_epoch)
    return SampleOrder(source.shard_sizes, batch_size, seed, data.window_shards)
