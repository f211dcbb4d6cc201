"""Walks the headers of a tar and lists its members, the samples they form, and what can't be used.

Nothing is extracted. A bad member is noted and drops its own sample, never the rest of the shard. Knows nothing of
decoding or batches.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from ijepa_scale.data.formats import image_suffixes, is_data_image, is_other_image, junk_in, suffix_of
from ijepa_scale.data.sources.labels import NO_LABEL, TEXT_LABEL, parse_label
from ijepa_scale.data.sources.mistaken import TAR, UNKNOWN, what_is
from ijepa_scale.errors import DataError
from ijepa_scale.escapes import one_line

MAX_MEMBER_BYTES = 64 << 20  # of an image; the largest JPEG in ImageNet has 15 MB
MAX_LABEL_BYTES = 1 << 20
MAX_MEMBERS = 20_000_000
MAX_HEADER_BYTES = 1 << 20  # of a long name or a PAX header, which is read whole
IRREGULAR = "a link, a device or sparse; write regular files (tar --dereference --hard-dereference)"
_NO_IMAGE = "no image (jpg, png, webp, ...); "
_LABELS = ("cls", "json")  # suffixes
_BLOCK = 512
_SHOWN = 12  # kinds of files that are passed over
_NAMED = 100  # problems of a shard that are stored with their names; all are counted


@dataclass(frozen=True)
class Problem:
    """Something that can't be used: a sample, a member, or the rest of a shard."""

    kind: str  # "link or device", "unsafe name", "member size", "several images", "bad label", "cut short" ...
    name: str
    reason: str


@dataclass
class Problems:
    """The problems of a listing: counts by kind, and the names of the first ones; and what it has passed over."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[Problem] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # images of formats that aren't read, by suffix
    skipped: Counter[str] = field(default_factory=Counter)  # what isn't an image: by suffix, or by name
    doubts: list[str] = field(default_factory=list)  # what a person should check about the classes, one sentence each

    def add(self, kind: str, name: str, reason: str, count: int = 1) -> None:
        """Counts a problem that costs `count` samples, and stores its name unless there are many already."""
        self.counts[kind] += count
        if len(self.named) < _NAMED:
            self.named.append(Problem(kind, name, reason))

    def extend(self, other: Problems) -> None:
        """Adds the problems of another shard."""
        self.counts += other.counts
        self.unread += other.unread
        self.skipped += other.skipped
        self.named += other.named[: _NAMED - len(self.named)]
        self.doubts += other.doubts

    def summary(self) -> str:
        """Returns the counts by kind, the most common first, and the name of the first problem."""
        counts = ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())
        first = self.named[0] if self.named else None
        return one_line(f"{counts}; the first is {first.name} ({first.reason})" if first else counts)

    def passed_over(self) -> str:
        """Returns the counts of what isn't read and isn't a problem, images first; "" if there is nothing."""
        counts = [*self.unread.most_common(), *self.skipped.most_common()]
        shown = ", ".join(f"{count} x {kind}" for kind, count in counts[:_SHOWN])
        more = sum(count for _, count in counts[_SHOWN:])
        return one_line(f"{shown}, {more} x other" if more else shown)

    def pass_over(self, name: str) -> None:
        """Counts a file that isn't read, by its suffix."""
        (self.unread if is_other_image(name) else self.skipped)[suffix_of(name)] += 1

    def dumps(self) -> bytes:
        """Returns the bytes that an index file stores."""
        rows = [[problem.kind, problem.name, problem.reason] for problem in self.named]
        return json.dumps([dict(self.counts), rows, dict(self.unread), dict(self.skipped)]).encode()

    @classmethod
    def loads(cls, data: bytes) -> Problems:
        """Returns the problems that `dumps` has encoded.

        Raises:
            ValueError: the bytes don't come from `dumps`.
        """
        counts, rows, *passed = json.loads(data)
        kinds, unread, skipped = (
            Counter({str(kind): int(count) for kind, count in one.items()}) for one in (counts, *passed)
        )
        if min(*kinds.values(), *unread.values(), *skipped.values(), 0, 0) < 0:
            raise ValueError("a negative count")
        return cls(kinds, [Problem(*map(str, row)) for row in rows[:_NAMED]], unread, skipped)


@dataclass(frozen=True)
class Scan:
    """The samples of a tar, ordered by the offset of their images, and its problems."""

    columns: np.ndarray  # (3, N) int64: offset and size in bytes, label; TEXT_LABEL - k is the label texts[k]
    keys: list[str]
    problems: Problems
    texts: list[str]  # labels that are names, sorted


@dataclass(frozen=True)
class Members:
    """The members to read of samples that have several images or labels, by suffix, like jpg, rgb.png, coarse.cls."""

    image: str | None = None  # None: the only image
    label: str | None = None  # None: the only .cls, else the only .json with a label

    def several_images(self, names: Iterable[str]) -> str:
        """Returns what is wrong with a sample that has these images."""
        return (
            f"its images are {_listed(names)}; choose the one to read, like data.image_member={min(names)}, or give "
            "each image its own name up to the first dot"
        )

    def several_labels(self, names: Iterable[str]) -> str:
        """Returns what is wrong with a sample that has these labels."""
        return f"its labels are {_listed(names)}; choose the one to read, like data.label_member={min(names)}"

    def no_image(self, names: Iterable[str]) -> str:
        """Returns what is wrong with a sample without an image to read; `names` are other images that it has."""
        if self.image is None:
            return _NO_IMAGE + "write it again"
        return f"no image {self.image}, but {_listed(names) or 'no other'}; correct data.image_member"

    def is_image(self, suffix: str) -> bool:
        """Returns whether a member with this suffix, in lower case, is an image that may be read or must be named."""
        known = suffix.rpartition(".")[2] in image_suffixes() or (self.image is None and is_data_image(suffix))
        return known or suffix == self.image

    def is_label(self, suffix: str) -> bool:
        """Returns whether a member with this suffix, in lower case, may have the label."""
        return suffix == self.label or (self.label is None and suffix.rpartition(".")[2] in _LABELS)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


@dataclass(slots=True)
class _Sample:
    """What a scan knows about one key."""

    image: str | None = None  # the image's suffix
    offset: int = 0
    size: int = 0
    more: tuple[str, ...] = ()  # suffixes of other images
    label: int | str = NO_LABEL
    label_from: str = ""  # the label's suffix
    more_labels: tuple[str, ...] = ()  # suffixes of other labels
    dropped: bool = False  # its problem has been noted


@dataclass(frozen=True)
class Break:
    """The point at which a tar breaks off or is damaged, and the reason."""

    reason: str
    byte: int


class _Headers(io.RawIOBase):
    """A file up to byte `end`. Refuses to read a header that claims to be huge, before tarfile allocates memory."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(min(size, max(0, self._end - self._file.tell())))


def walk_members(
    file: IO[bytes], use: Callable[[tarfile.TarFile, tarfile.TarInfo], None], *, begin: int = 0, end: int
) -> Break | None:
    """Walks the uncompressed tar in bytes `begin` to `end` of a file; returns where it breaks off, or None.

    Calls `use(tar, member)` for each whole member. Offsets of members count from the start of the file.

    Raises:
        DataError: over `MAX_MEMBERS` members.
        tarfile.TarError, EOFError, OSError, ValueError: not a tar at all.
    """
    file.seek(begin)
    reason = None
    with tarfile.open(fileobj=_Headers(file, end), mode="r:") as tar:
        try:
            for number, member in enumerate(tar):
                if number >= MAX_MEMBERS:
                    raise DataError(f"shard {file.name} has over {MAX_MEMBERS} members; write smaller shards")
                if member.offset_data + member.size > end and not member.issparse():
                    reason = f"member {member.name!r} ends after the file does"
                    break
                use(tar, member)
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            reason = str(error) or type(error).__name__
        file.seek(tar.offset)
        # tarfile ends silently at a damaged header, and when a copy broke off between two members
        if reason is None and file.read(_BLOCK)[: max(0, end - tar.offset)] != bytes(_BLOCK):
            reason = "no end mark"
        return None if reason is None else Break(reason, tar.offset)


def leaves_its_folder(name: str) -> bool:
    """Returns whether a member's name is absolute or contains `..`."""
    return name.startswith("/") or ".." in name.split("/")


def scan_tar(path: Path, members: Members | None = None) -> Scan:
    """Scans the headers of an uncompressed tar and returns its samples and problems.

    If the tar breaks off or is damaged, keeps the samples before that point, except the last one, which may lack
    its label.

    Raises:
        DataError: not a tar at all, or over `MAX_MEMBERS` members.
    """
    members = members or Members()
    samples: dict[str, _Sample] = {}
    problems = Problems()
    walk = _Walk(samples, problems, members)
    try:
        with path.open("rb") as file:
            tar_bytes = os.fstat(file.fileno()).st_size
            broken = walk_members(file, walk.add, end=tar_bytes) if tar_bytes else None
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        kind = what_is(path)
        why = f"{error}" if kind in (None, TAR, UNKNOWN) else f"it is {kind}"
        raise DataError(f"shard {path} isn't a readable tar ({why}); copy or write it again, uncompressed") from None
    if broken is not None:
        samples.pop(walk.last, None)
        problems.add(
            "cut short",
            str(path),
            f"cut short or damaged after byte {broken.byte} ({broken.reason}); copy or write it again",
        )
    return _result(path, samples, problems, members)


def _result(path: Path, samples: dict[str, _Sample], problems: Problems, members: Members) -> Scan:
    for key, sample in samples.items():
        if sample.dropped:
            continue
        wrong = None
        if sample.image is None:
            wrong = ("no image", members.no_image(sample.more))
        elif sample.more and members.image is None:
            wrong = ("several images", members.several_images((sample.image, *sample.more)))
        elif sample.more_labels:
            wrong = ("several labels", members.several_labels((sample.label_from, *sample.more_labels)))
        if wrong is not None:
            sample.dropped = True
            problems.add(wrong[0], f"{path}:{key}", wrong[1])
    whole = {key: sample for key, sample in samples.items() if not sample.dropped}
    if not whole and not problems.counts:
        problems.add("empty shard", str(path), _NO_IMAGE + "drop it from the list")
    ordered = sorted(whole.items(), key=lambda item: item[1].offset)
    texts = sorted({sample.label for sample in whole.values() if isinstance(sample.label, str)})
    code: dict[int | str, int] = {text: TEXT_LABEL - number for number, text in enumerate(texts)}
    rows = [(sample.offset, sample.size, code.get(sample.label, sample.label)) for _, sample in ordered]
    columns = np.ascontiguousarray(np.array(rows, dtype=np.int64).reshape(-1, 3).T)
    return Scan(columns, [key for key, _ in ordered], problems, texts)


class _Walk:
    """Collects the members of a tar by sample."""

    def __init__(self, samples: dict[str, _Sample], problems: Problems, members: Members) -> None:
        self._samples, self._problems, self._members = samples, problems, members
        self.last = ""  # the last key seen

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Adds one member to its sample, or notes why it can't be used."""
        parts = member.name.split("/")
        if member.isdir():
            return
        if leaves_its_folder(member.name):
            self._problems.add("unsafe name", member.name, "leaves its folder; write it again with relative names")
            return
        useless = junk_in(member.name)
        if useless is not None:
            self._problems.skipped[useless] += 1
            return
        stem, _, suffix = parts[-1].partition(".")
        key, suffix = "/".join([*parts[:-1], stem]), sys.intern(suffix.lower())
        sample = self._samples.setdefault(key, _Sample())
        if not member.isreg() or member.issparse():
            self._drop(sample, ("link or device", member.name), IRREGULAR)
        elif self._members.is_image(suffix):
            self._image(sample, member, suffix)
        elif self._members.is_label(suffix):
            self._label(sample, tar, member, suffix)
        elif suffix.rpartition(".")[2] not in _LABELS:  # labels that weren't chosen aren't counted
            self._problems.pass_over(parts[-1])
        self.last = key

    def _drop(self, sample: _Sample, what: tuple[str, str], reason: str) -> None:
        sample.dropped = True
        self._problems.add(*what, reason)

    def _image(self, sample: _Sample, member: tarfile.TarInfo, suffix: str) -> None:
        wanted = self._members.image
        if wanted is None and is_data_image(suffix):  # an image only if the sample has no other
            useful = 0 < member.size <= MAX_MEMBER_BYTES and (sample.image is None or is_data_image(sample.image))
            if not useful:
                return self._problems.pass_over(f"x.{suffix}")
        elif wanted is None and sample.image is not None and is_data_image(sample.image):
            for other in (sample.image, *sample.more):
                self._problems.pass_over(f"x.{other}")
            sample.image, sample.more = None, ()
        if suffix == sample.image:
            self._drop(sample, ("several images", member.name), "the tar has two members of this name; write it again")
        elif sample.image is not None or (wanted is not None and suffix != wanted):
            sample.more += (suffix,)
        elif not 0 < member.size <= MAX_MEMBER_BYTES:
            self._drop(
                sample, ("member size", member.name), f"{member.size} bytes; give 1 to {MAX_MEMBER_BYTES} (64 MiB)"
            )
        else:
            sample.image, sample.offset, sample.size = suffix, member.offset_data, member.size
        return None

    def _label(self, sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
        """Stores the label of a member, if it has one; a `.json` counts only without a `.cls`."""
        is_json, has_json = suffix.endswith("json"), sample.label_from.endswith("json")
        if is_json and sample.label_from and not has_json:
            return None
        if member.size > MAX_LABEL_BYTES:
            return self._drop(
                sample, ("bad label", member.name), f"{member.size} bytes; a label has at most {MAX_LABEL_BYTES}"
            )
        stream = tar.extractfile(member)
        assert stream is not None  # a regular file
        data = stream.read()
        try:
            label = parse_label(data, "json" if is_json else "cls")
        except (ValueError, RecursionError):
            return self._drop(
                sample,
                ("bad label", member.name),
                f"{data[:40]!r} isn't a label; give a number or name (.cls) or "
                '{"label": number or name} (.json); numbers begin at 0',
            )
        if label is None:
            return None
        if not sample.label_from or (has_json and not is_json):
            sample.label, sample.label_from, sample.more_labels = label, suffix, ()
        elif suffix != sample.label_from or label != sample.label:
            sample.more_labels += (suffix,)
        return None
