"""Makes a set of shards from images, each of which is verified; resumable.

The order of the images is a permutation keyed by the seed, so each shard is a mix of classes. Worker processes read,
decode and resize; only this process writes. So the bytes depend on nothing but the images and the plan. Knows nothing
of terminals or training.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ijepa_scale import rng
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.decode import decode
from ijepa_scale.data.deep_decode import decode_deep
from ijepa_scale.data.pil_decode import orientation_tag
from ijepa_scale.data.shards.journal import Entry, Journal
from ijepa_scale.data.shards.known import encode_png
from ijepa_scale.data.shards.write import Sample, ShardRow, image_suffix, write_manifest, write_parts
from ijepa_scale.data.sources.read_file import check_size
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.errors import DataError, SampleError

logger = logging.getLogger(__name__)

JPEG_QUALITY = 95  # of resized images, with full colour resolution (4:4:4)
MAX_BAD_FRACTION = 0.001
_CHUNK = 16  # images that a worker returns at once
_PREFETCH = 2


@dataclass(frozen=True, kw_only=True)
class MakePlan:
    """The settings that determine the bytes of the shards, apart from the images."""

    shard_bytes: int = 256 * 10**6  # of the images in one shard, at most
    prefix: str = "shard"
    seed: int = 0  # of the order of the images
    resize_shorter: int | None = None  # pixels: images with a longer shorter side are resized to it; None: no image is
    pixels: PixelFormat = RGB8  # what the images must be

    def __post_init__(self) -> None:
        if self.resize_shorter is not None and self.resize_shorter < 1:
            raise DataError(f"resize-shorter is {self.resize_shorter}; give a number of pixels, like 512")
        if (
            not self.prefix
            or not self.prefix.isprintable()
            or set(self.prefix) & set("/\\{}[]*?")
            or self.prefix[0] == "."
        ):
            raise DataError(f"prefix {self.prefix!r} can't begin a file name; give letters, like train")
        if self.resize_shorter is not None and not self.pixels.is_rgb8:
            raise DataError(
                f"resize-shorter is {self.resize_shorter} and images have {self.pixels}; only 8-bit RGB is resized: "
                "resize the others before"
            )

    def facts(self, source: SampleSource) -> dict[str, Any]:
        """Returns the facts that must be equal in a run that continues another."""
        return {
            "images from": getattr(source, "origin", source.summary()),
            "number of images": source.num_samples,
            "list of images": source.fingerprint[:64],
            "shard size": self.shard_bytes,
            "prefix": self.prefix,
            "seed": self.seed,
            "resize-shorter": self.resize_shorter,
            **({} if self.pixels.is_rgb8 else {"pixels": str(self.pixels)}),
        }


@dataclass(frozen=True)
class Made:
    """A finished set of shards."""

    shards: list[ShardRow]
    left_out: Counter[str]  # images that can't be used, by kind, and those of formats that aren't read, by suffix

    @property
    def num_samples(self) -> int:
        """The number of images in all shards."""
        return sum(row.samples for row in self.shards)


def make_shards(
    source: SampleSource,
    folder: str | Path,
    *,
    plan: MakePlan | None = None,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    progress: Callable[[int, int, int], None] | None = None,
) -> Made:
    """Writes all usable images of `source` into shards in `folder`, and returns what it has made.

    After an interruption at any moment, a call with the same source and plan continues after the last complete shard.
    The result is the same byte by byte, except for the mtime that each index records. Bad images are logged and left
    out. Calls `progress` with the number of images done, of shards written and of images left out.

    Raises:
        DataError: the folder holds something else; a file can't be read or written; or bad images are more than
            `max_bad_fraction` of all.
    """
    plan = plan or MakePlan()
    folder = Path(folder)
    try:
        journal = Journal(folder, plan.facts(source))
    except OSError as error:
        raise _unwritable(folder, error) from None
    whole = False
    try:
        run = _Run(source, journal, max_bad_fraction=max_bad_fraction, progress=progress or _silent)
        for row, last_key in write_parts(
            run.samples(plan, workers), folder, shard_bytes=plan.shard_bytes, prefix=plan.prefix,
            first=len(journal.entries),
        ):  # fmt: skip
            run.close_shard(row, int(last_key) + 1)
        made = run.made()
        _remove_scraps(folder, made.shards)
        write_manifest(folder, made.shards, classes=source.classes, left_out=made.left_out)
        whole = True
        return made
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        journal.close(whole=whole)


def prepare_image(data: bytes | np.ndarray, resize_shorter: int | None, wanted: PixelFormat = RGB8) -> bytes:
    """Decodes an image to check it, and returns the bytes to store: if possible, its own.

    Of other formats than 8-bit RGB, JPEG, PNG, WebP, TIFF, NPY and DICOM keep their bytes, and others become NPY.

    An 8-bit RGB image whose shorter side is above `resize_shorter` is resized to it (PIL bicubic, antialiased) and
    stored as JPEG. Pixels, and other formats than JPEG, PNG and WebP, are stored as PNG. The EXIF orientation stays.

    Raises:
        SampleError: it can't be decoded, or is too large for a shard.
    """
    if not wanted.is_rgb8:
        return _checked_bytes(data, wanted)
    pixels = decode(data)
    height, width = pixels.shape[:2]
    if resize_shorter is not None and min(height, width) > resize_shorter:
        shorter = min(height, width)
        size = (round(width * resize_shorter / shorter), round(height * resize_shorter / shorter))
        stream = io.BytesIO()
        try:
            resized = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            resized.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=orientation_tag(data))
        except OSError as error:  # over 65,500 pixels long
            raise SampleError(
                f"{size[0]} x {size[1]} pixels can't be stored as JPEG ({error}); drop it", "no JPEG"
            ) from None
        return stream.getvalue()
    if isinstance(data, np.ndarray) or image_suffix(data) not in ("jpg", "png", "webp"):
        data = encode_png(Image.fromarray(pixels), exif=orientation_tag(data))
    check_size(len(data))
    return data


def _checked_bytes(data: bytes | np.ndarray, wanted: PixelFormat) -> bytes:
    pixels = decode_deep(data, wanted)
    if isinstance(data, np.ndarray) or image_suffix(data) is None:
        stream = io.BytesIO()
        np.save(stream, pixels, allow_pickle=False)
        data = stream.getvalue()
    check_size(len(data))
    return data


@dataclass(frozen=True)
class _Bad:
    """An image that can't be used."""

    position: int  # in the order of images
    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class _Chunk:
    """A worker's result for some consecutive images, or the error that ends the run."""

    images: tuple[Sample | _Bad, ...] = ()
    error: str | None = None


class _Images(Dataset):
    """Maps (position of the first image, ids) to those images, read and verified."""

    def __init__(self, source: SampleSource, plan: MakePlan) -> None:
        self._source, self._plan = source, plan
        self._digits = max(6, len(str(source.num_samples - 1)))

    def __getitem__(self, item: tuple[int, np.ndarray]) -> _Chunk:
        try:
            return _Chunk(tuple(self._one(item[0] + row, int(sample)) for row, sample in enumerate(item[1])))
        except DataError as error:  # reported to the main process as one line, not as a worker's traceback
            return _Chunk(error=str(error))

    def _one(self, position: int, sample: int) -> Sample | _Bad:
        try:
            image = prepare_image(self._source.read(sample), self._plan.resize_shorter, self._plan.pixels)
        except SampleError as error:
            return _Bad(position, error.kind, self._source.name(sample), str(error))
        label = self._source.label(sample)
        return Sample(f"{position:0{self._digits}d}", image, label if label >= 0 else None)


class _Run:
    """One run of `make_shards`: yields the samples to write and counts those left out."""

    def __init__(
        self,
        source: SampleSource,
        journal: Journal,
        *,
        max_bad_fraction: float,
        progress: Callable[[int, int, int], None],
    ) -> None:
        self._source, self._journal, self._progress = source, journal, progress
        self._left_out: Counter[str] = Counter()  # by the listing and in complete shards
        self._pending: list[_Bad] = []  # left out since the last complete shard
        problems = source.problems()
        self._left_out.update(problems.counts)
        self._unread = problems.unread  # not among the bad ones, which are limited
        for problem in problems.named:
            logger.warning("left out: %s: %s", problem.name, problem.reason)
        for doubt in problems.doubts:
            logger.warning("%s", doubt)
        for entry in journal.entries:
            self._left_out.update(entry.left_out)
        self._max_bad_fraction = max_bad_fraction
        self._total = source.num_samples + problems.counts.total()

    def samples(self, plan: MakePlan, workers: int) -> Iterator[Sample]:
        """Yields the samples to write after the last complete shard."""
        self._check()
        order = _order(self._source, plan.seed)
        begin = self._journal.next_position
        if begin:
            logger.info("continuing after %d images in %d shards", begin, len(self._journal.entries))
        items = ((position, order[position : position + _CHUNK]) for position in range(begin, len(order), _CHUNK))
        chunks = ordered_loader(_Images(self._source, plan), items, workers=workers, prefetch=_PREFETCH)
        for chunk in chunks:
            if chunk.error is not None:
                raise DataError(chunk.error)
            for image in chunk.images:
                if isinstance(image, _Bad):
                    self._note(image)
                else:
                    yield image
            begin += len(chunk.images)
            self._progress(begin, len(self._journal.entries), self._num_bad)

    def close_shard(self, row: ShardRow, next_position: int) -> None:
        """Records a complete shard in the journal, with the images left out before its end."""
        settled = Counter(bad.kind for bad in self._pending if bad.position < next_position)
        self._pending = [bad for bad in self._pending if bad.position >= next_position]
        self._journal.add(Entry(row, next_position, dict(sorted(settled.items()))))
        self._left_out.update(settled)

    def made(self) -> Made:
        """Returns the set as written so far."""
        left_out = self._left_out + Counter(bad.kind for bad in self._pending)
        return Made([entry.shard for entry in self._journal.entries], left_out + self._unread)

    @property
    def _num_bad(self) -> int:
        return self._left_out.total() + len(self._pending)

    def _note(self, bad: _Bad) -> None:
        logger.warning("left out: %s: %s", bad.name, bad.reason)
        self._pending.append(bad)
        self._check()

    def _check(self) -> None:
        """Raises `DataError` as soon as it is certain that too many images are bad."""
        if self._num_bad > self._max_bad_fraction * self._total:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in self.made().left_out.most_common())
            raise DataError(
                f"{self._num_bad} of {self._total} images can't be used ({kinds}), over the allowed fraction "
                f"{self._max_bad_fraction:g}; fix them and start in an empty folder, or raise --max-bad-fraction "
                "and run make again to continue without them"
            )


def _order(source: SampleSource, seed: int) -> np.ndarray:
    """Returns the sample ids in the order in which they are written.

    It is a permutation of all. A source has `window_shards` if reading one image costs reading its whole shard: then
    the shards are permuted, and the samples of that many consecutive shards at a time.
    """
    window = getattr(source, "window_shards", None)
    if window is None:
        return rng.permutation(source.num_samples, seed, "write")
    begins = np.cumsum(source.shard_sizes) - source.shard_sizes
    shards = rng.permutation(len(begins), seed, "write.shards")
    found = []
    for number, first in enumerate(range(0, len(shards), window)):
        chosen = shards[first : first + window]
        ids = np.concatenate([np.arange(begins[one], begins[one] + source.shard_sizes[one]) for one in chosen])
        found.append(ids[rng.permutation(len(ids), seed, "write.window", number)])
    return np.concatenate(found)


def _remove_scraps(folder: Path, shards: list[ShardRow]) -> None:
    """Removes temporary index files that killed processes have left."""
    names = {row.name for row in shards}
    for path in folder.glob(".*.tar.idx.npz.*"):
        if path.name[1:].partition(".idx.npz.")[0] in names:
            path.unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{error.filename or folder} can't be written ({error.strerror}); make room or fix the permissions, and "
        "run make again with the same arguments to continue"
    )


def _silent(done: int, shards: int, left_out: int) -> None:
    """Ignores the progress."""


__all__ = ["JPEG_QUALITY", "MAX_BAD_FRACTION", "Made", "MakePlan", "make_shards", "prepare_image"]
