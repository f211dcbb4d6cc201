"""From configuration to what is read, and in which order. The only place that knows all readers."""

from __future__ import annotations

from pathlib import Path

from ijepa_scale.config.data import DataConfig
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.remote import RemoteShardSource, open_cache
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError


def build_source(
    reader: str, pattern: str | Path | None, *, num_samples: int = 1_281_167, image_size: tuple[int, int] = (256, 256)
) -> SampleSource:
    """Returns the source that `data.reader` and `data.train` describe; the sizes are those of a synthetic one.

    Raises:
        DataError: no pattern, an unknown reader, or data that can't be read.
    """
    if reader == "synthetic":
        return SyntheticSource(num_samples, image_size)
    if reader not in ("shards", "imagefolder"):
        raise DataError(f"reader {reader!r} is unknown; choose shards, imagefolder or synthetic")
    if pattern is None:
        raise DataError(f"reader {reader!r} has no data to read; name it, e.g. data.train=/data/imagenet/train")
    return ShardSource(expand(pattern)) if reader == "shards" else ImageFolderSource(pattern)


def training_source(data: DataConfig, image_size: tuple[int, int]) -> SampleSource | StreamSource:
    """Returns what the training images of a run come from; `image_size` is that of synthetic ones.

    Raises:
        DataError: data that isn't named, can't be read, or is remote without a cache.
    """
    if data.reader == "stream":
        if data.train is None:
            raise DataError("reader 'stream' has no data to read; name shards, e.g. data.train=/data/{000..127}.tar")
        return StreamSource(data.train, shuffle=data.stream_shuffle, allow_pipe=data.allow_pipe)
    if data.reader == "shards" and data.train is not None and scheme_of(data.train) is not None:
        source = RemoteShardSource(data.train, open_cache(data.cache, data.cache_gb, data.train))
        source.check_room(data.window_shards)
        return source
    return build_source(data.reader, data.train, num_samples=data.synthetic_samples, image_size=image_size)


def training_order(
    data: DataConfig, source: SampleSource | StreamSource, batch_size: int, *, seed: int, steps_per_epoch: int | None
) -> SampleOrder | StreamOrder:
    """Returns the order of the samples; `steps_per_epoch` is the length that a stream is said to have.

    Raises:
        DataError: a batch larger than the set, or a stream without a length.
    """
    if isinstance(source, StreamSource):
        if steps_per_epoch is None:
            raise DataError(
                "data.reader stream: a stream has no known length; give schedule.steps_per_epoch (samples // batch)"
            )
        return StreamOrder(batch_size, steps_per_epoch)
    return SampleOrder(source.shard_sizes, batch_size, seed, data.window_shards)
