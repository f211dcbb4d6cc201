"""The readers of the package, which build the source that `data.reader` names. Must not know the order of samples.

A reader is a function or class in `registry.SOURCES`. It takes the section `data` and the size of synthetic images, and
returns a `SampleSource`. It may have `Config`, a subclass of `DataConfig`.
"""

from __future__ import annotations

from ijepa_scale.config.data import DataConfig
from ijepa_scale.data.sources.fetch import Retry, scheme_of
from ijepa_scale.data.sources.file_list import ListSource
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.mistaken import mistaken
from ijepa_scale.data.sources.remote import RemoteShardSource, open_cache
from ijepa_scale.data.sources.scan import Members
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError


def read_shards(data: DataConfig, image_size: tuple[int, int]) -> ShardSource:
    """Returns the samples of tar shards, local or remote.

    Raises:
        DataError: `data.train` is missing, the shards can't be read, or they are remote and there is no cache.
    """
    pattern, members = _named(data), Members(data.image_member, data.label_member)
    hashed = data.verify == "first_open"
    if scheme_of(pattern) is None:
        return ShardSource(expand(pattern), members, pattern=pattern, hashed=hashed)
    cache = open_cache(data.cache, data.cache_gb, pattern, retry=Retry(redirect_hosts=data.redirect_hosts))
    source = RemoteShardSource(pattern, cache, members, hashed=hashed)
    source.check_room(data.window_shards)
    return source


def read_stream(data: DataConfig, image_size: tuple[int, int]) -> StreamSource:
    """Returns a stream of tar shards, which `webdataset` reads from beginning to end.

    Raises:
        DataError: `data.train` is missing, or its address isn't allowed.
    """
    if data.train is None:
        raise DataError("reader 'stream' has no data to read; name shards, e.g. data.train=/data/{000..127}.tar")
    return StreamSource(
        data.train,
        shuffle=data.stream_shuffle,
        allow_pipe=data.allow_pipe,
        retry=Retry(redirect_hosts=data.redirect_hosts),
        members=Members(data.image_member, data.label_member),
    )


def read_folder(data: DataConfig, image_size: tuple[int, int]) -> ImageFolderSource:
    """Returns the images of class folders, or of a folder without labels.

    Raises:
        DataError: `data.train` is missing, it has no images, or what its folders are can't be told.
    """
    return ImageFolderSource(_named(data), most_loose=data.max_bad_fraction)


def read_list(data: DataConfig, image_size: tuple[int, int]) -> ListSource:
    """Returns the images that a CSV or text file lists.

    Raises:
        DataError: `data.train` is missing or no list, or the list has mistakes.
    """
    if (error := mistaken(_named(data), "list")) is not None:
        raise error
    return ListSource(_named(data))


def read_synthetic(data: DataConfig, image_size: tuple[int, int]) -> SyntheticSource:
    """Returns `data.synthetic_samples` noise images of `image_size`, height and width in pixels."""
    return SyntheticSource(data.synthetic_samples, image_size)


def _named(data: DataConfig) -> str:
    if data.train is None:
        raise DataError(f"reader {data.reader!r} has no data to read; name it, e.g. data.train=/data/imagenet/train")
    return data.train
