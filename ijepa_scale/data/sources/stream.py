"""Reads tar shards from beginning to end, like plain WebDataset: no index, no copy, no state.

Unlike the indexed reader, it can't
- resume: a run that continues starts new passes;
- see each sample once per epoch: every worker cycles through its own share of the shards;
- deliver the same batches to another number of processes or workers;
- recover a connection that breaks inside a shard: the rest of that shard is left out.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import webdataset
from webdataset.tariterators import group_by_keys

from ijepa_scale import rng
from ijepa_scale.data.formats import is_data_image, junk_in
from ijepa_scale.data.order import part_size
from ijepa_scale.data.sources.fetch import Retry, check_address, open_remote, scheme_of
from ijepa_scale.data.sources.labels import NO_LABEL, parse_label
from ijepa_scale.data.sources.mistaken import TAR, mistaken, what_is
from ijepa_scale.data.sources.scan import (
    MAX_LABEL_BYTES,
    MAX_MEMBER_BYTES,
    Members,
    Problems,
)
from ijepa_scale.data.sources.shard_manifest import MANIFEST, Expected, expected_shards
from ijepa_scale.data.sources.tar_index import braces, expand
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted

_PIPE = "pipe:"
_BLOCK = 512  # bytes in a tar header
_LOOKED_AT = 16  # local shards of which one must be a tar, or what is named isn't shards


@dataclass(frozen=True)
class StreamSample:
    """An encoded image from the stream; if `kind` is set, a problem that was found instead of an image."""

    sample_id: int  # a hash of shard, key and pass, not an index into a set
    pass_number: int
    name: str
    data: bytes = b""
    label: int = NO_LABEL
    kind: str | None = None
    reason: str = ""


class _Draws:
    """The part of `random.Random` that webdataset's shuffle needs, with keyed draws."""

    def __init__(self, key: int) -> None:
        self._numbers = np.random.Generator(np.random.Philox(key=key))

    def randint(self, low: int, high: int) -> int:
        """Returns an integer in [low, high]."""
        return int(self._numbers.integers(low, high, endpoint=True))


class _Tail(io.RawIOBase):
    """A stream that remembers its last bytes, because tarfile ends silently at a cut or damaged header."""

    _KEPT = 1 << 15  # tarfile reads ahead 10 KB

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._kept, self._count = file, b"", 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._kept = (self._kept + data)[-self._KEPT :]
        self._count += len(data)
        return data

    def has_end_mark(self, offset: int) -> bool:
        """Returns whether the block at `offset` is the end mark."""
        begin = offset - (self._count - len(self._kept))
        return begin >= 0 and self._kept[begin : begin + _BLOCK] == bytes(_BLOCK)


class StreamOrder:
    """Counts the epochs of a stream of unknown length: an epoch is `steps_per_epoch` steps."""

    num_samples = None

    def __init__(self, batch_size: int, steps_per_epoch: int) -> None:
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch

    def epoch(self, step: int) -> int:
        """Returns the epoch that global batch `step` belongs to."""
        return step // self.steps_per_epoch

    def part_size(self, world: int) -> int:
        """Returns the images of a global batch that each of `world` processes takes.

        Raises:
            DataError: the batch doesn't divide among the processes.
        """
        return part_size(self.batch_size, world)


class StreamSource:
    """Shards that are streamed: local paths, addresses that fsspec reads, or, if allowed, `pipe:` commands.

    Each worker buffers `shuffle` encoded samples and draws from them at random.
    """

    num_samples = None

    def __init__(
        self,
        pattern: str,
        *,
        shuffle: int = 1000,
        allow_pipe: bool = False,
        retry: Retry | None = None,
        members: Members | None = None,
    ) -> None:
        self._members = members or Members()
        self.urls = _expand(pattern, allow_pipe)
        local = scheme_of(pattern) is None and not pattern.startswith(_PIPE)
        if local and not any(what_is(url) == TAR for url in self.urls[:_LOOKED_AT]):
            raise mistaken(self.urls[0], "shards") or DataError(
                f"shard {self.urls[0]} can't be read; check the path and its permissions"
            )
        self._expected = expected_shards([Path(url) for url in self.urls], pattern) if local else Expected()
        self._shuffle, self._retry = shuffle, retry or Retry()
        names = "\n".join(url.rpartition("/")[2] for url in self.urls)
        self.fingerprint = f"stream {hashlib.sha256(names.encode('utf-8', 'surrogateescape')).hexdigest()}"

    def summary(self) -> str:
        """Returns the number of shards, for the log."""
        return f"a stream of {len(self.urls)} shards"

    def problems(self) -> Problems:
        """Returns the local shards that are missing or of another size according to their manifest; reads nothing."""
        found = Problems(doubts=self._expected.doubts)
        for path, row in self._expected.missing:
            found.add("missing shard", str(path), f"{MANIFEST} names it, with {row.samples} samples", row.samples)
        for path, row in self._expected.rows.items():
            size = path.stat().st_size if path.exists() else 0
            if size != row.bytes:
                kind = "changed shard" if size else "empty shard"
                found.add(kind, str(path), f"{size} bytes, but {MANIFEST} says {row.bytes}", row.samples)
        return found

    @property
    def num_counted(self) -> int:
        """The samples that manifests count in the shards that are whole."""
        every = [*self._expected.rows.values(), *(row for _, row in self._expected.missing)]
        return sum(row.samples for row in every) - self.problems().counts.total()

    def check_parts(self, world: int, workers: int) -> None:
        """Checks that each reader has at least one shard to read.

        Raises:
            DataError: there are more readers than shards.
        """
        readers = world * max(1, workers)
        if len(self.urls) < readers:
            raise DataError(
                f"data.reader stream: {counted(len(self.urls), 'shard')} for {world} processes x "
                f"{max(1, workers)} workers; each "
                "worker needs a shard of its own: lower data.workers, write more shards, or use data.reader=shards"
            )

    def stream(self, seed: int, start_step: int, part: int, parts: int) -> Iterator[StreamSample]:
        """Yields the samples of reader `part` of `parts`, without end; in each pass, readers read disjoint shards.

        Raises:
            DataError: a whole pass without a sample, or a shard that can't be opened.
        """
        passing = self._passes(seed, start_step, part, parts)
        if self._shuffle > 1:
            mix = cast(Callable[..., Any], webdataset.shuffle)
            draws = _Draws(rng.key(seed, "stream.samples", start_step, part))
            passing = iter(mix(self._shuffle, initial=min(100, self._shuffle), rng=draws)(passing))
        return passing

    def _passes(self, seed: int, start_step: int, part: int, parts: int) -> Iterator[StreamSample]:
        number = 0
        while True:
            stream = f"stream.shards.{start_step}"  # a resumed run doesn't start with the same shards again
            count, first = 0, ""
            for shard in rng.permutation(len(self.urls), seed, stream, number)[part::parts]:
                for sample in self._shard(self.urls[int(shard)], number):
                    count += sample.kind is None
                    first = first or (f" (the first is {sample.name}: {sample.reason})" if sample.kind else "")
                    yield sample
            if not count:
                raise DataError(
                    f"{self.summary()}: a pass over the shards of reader {part} found no sample{first}; "
                    "check that they are tars with images (launch/shards.py info)"
                )
            number += 1

    def _shard(self, url: str, number: int) -> Iterator[StreamSample]:
        """Yields the samples of one shard; a shard that breaks off ends there and counts as one bad sample."""
        bad: list[StreamSample] = []
        seen: set[str] = set()

        def note_duplicate(error: Exception) -> bool:
            bad.append(StreamSample(0, number, url, kind="several images", reason=str(error.args[0])))
            return True

        with _open(url, self._retry) as file:
            for sample in group_by_keys(_members(file, url, number, bad, self._members), handler=note_duplicate):
                yield from bad
                bad.clear()
                found = _sample(sample, url, number, self._members)
                yield _split(found) if sample["__key__"] in seen else found
                seen.add(sample["__key__"])
        yield from bad


def _members(
    file: IO[bytes], url: str, number: int, bad: list[StreamSample], wanted: Members
) -> Iterator[dict[str, Any]]:
    """Yields the images and labels of a tar in the form that webdataset groups; adds unusable ones to `bad`."""
    tail = _Tail(file)
    try:
        with tarfile.open(fileobj=tail, mode="r|") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
                suffix = member.name.lower().rpartition("/")[2].partition(".")[2]
                is_image = wanted.is_image(suffix)
                if not member.isreg() or not (is_image or wanted.is_label(suffix)):
                    continue
                if junk_in(member.name) is not None:
                    continue
                most = MAX_MEMBER_BYTES if is_image else MAX_LABEL_BYTES
                if not 0 < member.size <= most:
                    if wanted.image is None and is_data_image(suffix):
                        continue
                    reason = f"{member.size} bytes; give 1 to {most}"
                    bad.append(StreamSample(0, number, f"{url}:{member.name}", kind="member size", reason=reason))
                    continue
                stream = tar.extractfile(member)
                assert stream is not None  # a regular file
                data = stream.read()
                if len(data) != member.size:
                    raise EOFError(f"{member.name!r} has {len(data)} of {member.size} bytes")
                yield {"fname": member.name, "data": data, "__url__": url}
            if not tail.has_end_mark(tar.offset):
                raise EOFError("no end mark")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        reason = f"cut short, damaged or disconnected ({error})"
        bad.append(StreamSample(0, number, url, kind="cut short", reason=reason))


def _sample(members: dict[str, Any], url: str, number: int, wanted: Members) -> StreamSample:
    """Returns the sample made of grouped members."""
    key = members["__key__"]
    digest = hashlib.blake2b(f"{url.rpartition('/')[2]}|{key}|{number}".encode("utf-8", "surrogateescape"))
    sample_id, name = int.from_bytes(digest.digest()[:8], "little") >> 1, f"{url}:{key}"
    images = [suffix for suffix in members if wanted.is_image(suffix)]
    if wanted.image is None:
        images = [suffix for suffix in images if not is_data_image(suffix)] or images
    chosen = [suffix for suffix in images if suffix == wanted.image or wanted.image is None]
    if not chosen:
        return StreamSample(sample_id, number, name, kind="no image", reason=wanted.no_image(images))
    if len(chosen) > 1:
        return StreamSample(sample_id, number, name, kind="several images", reason=wanted.several_images(chosen))
    labels: dict[str, int | str] = {}
    try:
        for suffix in filter(wanted.is_label, members):
            label = parse_label(members[suffix], "json" if suffix.endswith("json") else "cls")
            if label is not None:
                labels[suffix] = label
    except (ValueError, RecursionError):
        reason = "neither a number or name (.cls) nor a label (.json)"
        return StreamSample(sample_id, number, name, kind="bad label", reason=reason)
    best = [suffix for suffix in labels if not suffix.endswith("json")] or list(labels)
    if len(best) > 1:
        return StreamSample(sample_id, number, name, kind="several labels", reason=wanted.several_labels(best))
    label = labels[best[0]] if best else NO_LABEL
    # no list numbers the names of a stream, which only pretraining reads
    return StreamSample(sample_id, number, name, members[chosen[0]], label if isinstance(label, int) else NO_LABEL)


def _split(sample: StreamSample) -> StreamSample:
    """Returns the problem of a sample that comes a second time, since its members aren't next to each other."""
    reason = "its members aren't next to each other in the tar; sort them by name, or use data.reader=shards"
    return StreamSample(sample.sample_id, sample.pass_number, sample.name, kind="split sample", reason=reason)


def _expand(pattern: str, allow_pipe: bool) -> list[str]:
    """Returns the shards that a pattern names."""
    if pattern.startswith(_PIPE):
        if not allow_pipe:
            raise DataError(
                f"{pattern!r} would run a shell command; if you trust it, set data.allow_pipe=true, else name files"
            )
        return sorted(set(braces(pattern)))
    if scheme_of(pattern) is None:
        return [str(path) for path in expand(pattern)]
    check_address(pattern)
    return sorted(set(braces(pattern)))


def _open(url: str, retry: Retry) -> IO[bytes]:
    """Returns the shard as a stream of bytes."""
    if url.startswith(_PIPE):
        return cast(IO[bytes], webdataset.gopen(url, "rb"))
    if scheme_of(url) is not None:
        return open_remote(url, retry)
    try:
        if not stat.S_ISREG(os.stat(url).st_mode):  # opening a pipe would wait
            raise DataError(f"shard {url} isn't a regular file; replace it, or drop it from the list")
        return Path(url).open("rb")
    except OSError as error:
        raise DataError(f"shard {url} can't be read ({error.strerror}); check the path and its permissions") from None


__all__ = ["StreamOrder", "StreamSample", "StreamSource"]
