"""The command line for shards: make, verify, info, index, classes, stats. Only parses arguments and prints results."""

from __future__ import annotations

import argparse
import os
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ijepa_scale import terminal
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.form import PixelType, member_suffix
from ijepa_scale.config.pixels import MAX_CHANNELS, RGB8, PixelFormat
from ijepa_scale.data.shards.byte_sizes import format_bytes, parse_bytes
from ijepa_scale.data.shards.describe import describe_shards
from ijepa_scale.data.shards.image_files import CsvImages, FolderImages
from ijepa_scale.data.shards.known import DATASETS, TorchvisionImages
from ijepa_scale.data.shards.make import JPEG_QUALITY, MAX_BAD_FRACTION, MakePlan, make_shards
from ijepa_scale.data.shards.measure import measure
from ijepa_scale.data.shards.parquet import Columns, ParquetImages
from ijepa_scale.data.shards.tars import TarImages
from ijepa_scale.data.shards.verify import verify_shards
from ijepa_scale.data.shards.write import write_classes
from ijepa_scale.data.shards.zips import ZipImages
from ijepa_scale.data.sources.class_list import CLASSES, names_in
from ijepa_scale.data.sources.file_list import ListSource
from ijepa_scale.data.sources.labels import NO_LABEL, class_warnings
from ijepa_scale.data.sources.listing import root_of
from ijepa_scale.data.sources.lost_shards import problems_of, usable_shards
from ijepa_scale.data.sources.open import reader_of, training_source
from ijepa_scale.data.sources.scan import Members, Problems
from ijepa_scale.data.sources.source import SampleSource, check_problems
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.sources.tar_index import ShardIndex, expand, index_tar
from ijepa_scale.data.statistics import STATISTICS, statistics_path, write_statistics
from ijepa_scale.errors import DataError
from ijepa_scale.escapes import one_line
from ijepa_scale.plurals import counted
from ijepa_scale.registry import SOURCES

READERS = ("imagefolder", "list", "csv", "tar", "zip", "parquet")
_NOT_MEASURED = ("stream", "synthetic")
_MOST_WORKERS = 16  # the default uses no more, even on machines with more cores
_LINE_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the commands and their options."""
    commands = parser.add_subparsers(dest="command", required=True)
    cores = min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
    make = commands.add_parser(
        "make",
        help="write shards from images; after an interruption, run it again with the same arguments to continue",
        description="Writes shards from images, each of which is decoded first. If it is interrupted at any moment, "
        "run it again with the same arguments: it continues, and the shards are the same byte by byte.",
    )
    make.add_argument(
        "--from", dest="reader", default="imagefolder", metavar="KIND", choices=[*READERS, *DATASETS],
        help="imagefolder (default; class folders, or a folder without labels), csv (path,label), list (one path a "
        "line), tar (CLASS/*.jpg members, or CLASS.tar members), zip, parquet (a file, folder or glob with a column of "
        f"images), or a torchvision name: {', '.join(DATASETS)}",
    )  # fmt: skip
    make.add_argument(
        "--root", type=terminal.path, required=True, help="folder, file, or the folder of torchvision's files"
    )
    make.add_argument(
        "--to", type=terminal.path, required=True, help="folder for the shards; it must not contain any yet"
    )
    make.add_argument(
        "--split", help="folder in ROOT that contains the class folders (default: train, if ROOT contains only "
        "splits), . for ROOT itself, or '**' for all images in it without labels; for a torchvision data set, its "
        "split (default train)",
    )  # fmt: skip
    for name in ("image", "label"):
        make.add_argument(f"--{name}-column", metavar="NAME", help=f"parquet: the column of {name}s, if several may be")
    make.add_argument("--download", action="store_true", help="let torchvision download missing files into ROOT")
    make.add_argument(
        "--shard-size", default="256MB", help="size of the images in a shard, like 256MB, 1GiB or 500kB (default 256MB)"
    )
    make.add_argument(
        "--resize-shorter", type=int, metavar="PIXELS", help="resize images whose shorter side is larger (bicubic, "
        f"antialiased; JPEG of quality {JPEG_QUALITY}, 4:4:4); the others are stored unchanged",
    )  # fmt: skip
    make.add_argument("--prefix", default="shard", help="beginning of the shards' names (default shard)")
    make.add_argument("--seed", type=int, default=0, help="seed of the order in which images are written (default 0)")
    verify = commands.add_parser("verify", help="hash the shards and decode every image; exit with code 2 on faults")
    stats = _add_stats(commands)
    for command, verb in ((make, "decode"), (verify, "hash and decode"), (stats, "decode")):
        command.add_argument("--channels", type=int, default=RGB8.channels, help="channels of an image (default 3)")
        command.add_argument(
            "--pixels", default=RGB8.dtype, choices=typing.get_args(PixelType), help="type of their values"
        )
        command.add_argument(
            "--workers",
            type=int,
            default=cores,
            help=f"number of processes that {verb}; 0 uses this process (default on this machine: {cores})",
        )
    for command in (make, stats):
        command.add_argument(
            "--max-bad-fraction", type=float, default=MAX_BAD_FRACTION, metavar="X",
            help=f"fraction of images that may be left out because they can't be used (default {MAX_BAD_FRACTION:g})",
        )  # fmt: skip
    info = commands.add_parser("info", help="describe the shards")
    index = commands.add_parser("index", help="write indices next to shards that were made by other tools")
    classes = commands.add_parser(
        "classes", help=f"write {CLASSES}, which numbers labels that are names, next to shards made by other tools"
    )
    for command in (verify, info, index, classes):
        command.add_argument("pattern", type=terminal.path, help="folder, glob or {000..127} pattern")
    for command in (verify, info, index, classes, stats):
        for name, like in (("image", "jpg"), ("label", "cls")):
            command.add_argument(
                f"--{name}-member",
                type=_suffix,
                metavar="SUFFIX",
                help=f"{name} to read of samples with several, like {like}",
            )


def _add_stats(commands: Any) -> argparse.ArgumentParser:
    """Adds the command `stats`."""
    stats = commands.add_parser(
        "stats",
        help=f"measure mean and standard deviation of each channel, and write {STATISTICS} next to the images",
        description="Measures mean and standard deviation of each channel over all pixels, which training takes where "
        "augment.mean and augment.std are null.",
    )
    stats.add_argument("data", type=terminal.path, help="what data.train names: folder, list, or pattern of shards")
    known = [name for name in SOURCES.names() if name not in _NOT_MEASURED]
    stats.add_argument(
        "--reader", choices=known, help="how they are stored, as in data.reader; default: by what DATA is"
    )
    return stats


def _suffix(text: str) -> str:
    try:
        return member_suffix(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_command(options: argparse.Namespace) -> int:
    """Runs the command and returns the exit code: 0, or 2 if `verify` has found faults.

    Raises:
        DataError: a mistake that the user can fix.
    """
    if getattr(options, "workers", 0) < 0:
        raise DataError(f"workers is {options.workers}; give 0 or more processes")
    if not 0 <= getattr(options, "max_bad_fraction", 0) <= 1:
        raise DataError(f"max-bad-fraction is {options.max_bad_fraction:g}; give a fraction from 0 to 1")
    if not 1 <= getattr(options, "channels", 1) <= MAX_CHANNELS:
        raise DataError(f"channels is {options.channels}; give 1 to {MAX_CHANNELS}")
    with logging_redirect_tqdm():
        return _COMMANDS[options.command](options)


def open_images(
    reader: str,
    root: str,
    *,
    split: str | None = None,
    download: bool = False,
    columns: Columns | None = None,
    most_loose: float = MAX_BAD_FRACTION,
) -> SampleSource:
    """Returns the images that `--from`, `--root` and the options of single readers name.

    `most_loose` is the share of images in no folder that class folders may have; see `ImageFolderSource`.

    Raises:
        DataError: there are no images, or an argument doesn't apply to this reader.
    """
    if download and reader in READERS:
        raise DataError(f"--download is for torchvision's data sets, not for {reader}; drop it")
    if columns is not None and reader != "parquet":
        raise DataError(f"--image-column and --label-column are for parquet, not for {reader}; drop them")
    if reader in DATASETS:
        return TorchvisionImages(reader, root, split=split, download=download)
    if reader == "imagefolder":
        return FolderImages(root, split, most_loose=most_loose)
    if reader in ("tar", "zip"):
        return (TarImages if reader == "tar" else ZipImages)(root, split, most_loose=most_loose)
    if split is not None:
        own = (
            "name the files of the split"
            if reader == "parquet"
            else "list the images of the split in a file of their own"
        )
        raise DataError(f"--split {split} is not for {reader}; {own}")
    if reader == "parquet":
        return ParquetImages(root, columns)
    return CsvImages(root) if reader == "csv" else ListSource(root)


def _make(options: argparse.Namespace) -> int:
    plan = MakePlan(
        shard_bytes=parse_bytes(options.shard_size),
        prefix=options.prefix,
        seed=options.seed,
        resize_shorter=options.resize_shorter,
        pixels=PixelFormat(options.channels, options.pixels),
    )
    if options.reader == "imagefolder" and Path(options.to).resolve().is_relative_to(root_of(options.root).resolve()):
        raise DataError(
            f"--to {options.to} is inside --root {options.root} and would become a class; name another folder"
        )
    chosen = Columns(options.image_column, options.label_column)
    source = open_images(
        options.reader, options.root, split=options.split, download=options.download,
        columns=None if chosen == Columns() else chosen, most_loose=options.max_bad_fraction,
    )  # fmt: skip
    terminal.say(source.summary())
    if options.reader != "csv" and source.classes:  # CSV lists warn of their lines
        for line in class_warnings(source.classes, f"--root {options.root}"):
            terminal.report(line, "warning")
    with _Progress(source.num_samples, "images") as progress:
        made = make_shards(
            source, options.to, plan=plan, workers=options.workers, max_bad_fraction=options.max_bad_fraction,
            progress=lambda done, shards, bad: progress.show(done, f"{counted(shards, 'shard')}, {bad} left out"),
        )  # fmt: skip
    kinds = ", ".join(f"{count} x {kind}" for kind, count in made.left_out.most_common())
    size = format_bytes(sum(row.bytes for row in made.shards))
    skipped = Problems(skipped=source.problems().skipped).passed_over()
    counts = f"{counted(made.num_samples, 'image')} in {counted(len(made.shards), 'shard')}, {size}"
    passed = f"; skipped: {skipped}" if skipped else ""
    terminal.say(f"{counts}, in {options.to}; left out: {kinds or 'none'}{passed}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    paths = expand(options.pattern)
    folders = len({path.parent for path in paths})
    faults, samples, pixels = 0, 0, PixelFormat(options.channels, options.pixels)
    hashed = True
    with _Progress(len(paths), "shards") as progress:
        for number, verdict in enumerate(
            verify_shards(paths, workers=options.workers, members=_members(options), pixels=pixels), start=1 - folders
        ):
            for fault in verdict.faults:
                progress.note(f"bad: {fault}")
            faults, samples = faults + len(verdict.faults), samples + verdict.num_samples
            hashed = hashed and verdict.hashed
            progress.show(max(0, number), f"{counted(samples, 'image')}, {counted(faults, 'fault')}")
    checked = "hashes and images" if hashed else "images (hashes unchecked: no manifest.json)"
    result = counted(faults, "fault") if faults else f"{checked} are good"
    terminal.say(f"{counted(len(paths), 'shard')}, {counted(samples, 'image')}: {result}")
    return 2 if faults else 0


def _info(options: argparse.Namespace) -> int:
    shards, rows, lost = usable_shards(expand(options.pattern), _members(options), options.pattern)
    if not shards:
        raise DataError(f"{options.pattern}: no shard can be used: {lost.summary()}")
    _check_members(options, shards)
    terminal.say(*describe_shards(shards, problems_of(shards, rows, lost)))
    return 0


def _index(options: argparse.Namespace) -> int:
    def tell(index: ShardIndex) -> None:
        found = index.problems.summary()
        terminal.say(f"{index.path}: {counted(len(index), 'sample')}{f'; left out: {found}' if found else ''}")

    _indexed(options, tell)
    return 0


def _classes(options: argparse.Namespace) -> int:
    paths = expand(options.pattern)
    folders = sorted({path.parent for path in paths})
    if len(folders) > 1:
        raise DataError(f"{options.pattern} names shards in {len(folders)} folders; name those of one folder")
    path = folders[0] / CLASSES
    if path.exists():
        raise DataError(f"{path} exists and numbers the classes; remove it if it is wrong, and write it again")
    names = names_in(_indexed(options))
    for line in class_warnings(names, "the list"):
        terminal.report(line, "warning")
    write_classes(folders[0], names)
    terminal.say(f"{path}: {counted(len(names), 'class')}, {names[0]!r} to {names[-1]!r}")
    return 0


def _indexed(options: argparse.Namespace, tell: Callable[[ShardIndex], None] | None = None) -> list[ShardIndex]:
    """Returns the indices of the shards, and calls `tell` with each as soon as it is there.

    Raises:
        DataError: a member is chosen that no sample has.
    """
    members = _members(options)
    found = []
    for path in expand(options.pattern):
        found.append(index_tar(path, members))
        if tell is not None:
            tell(found[-1])
    _check_members(options, found)
    return found


def _check_members(options: argparse.Namespace, found: list[ShardIndex]) -> None:
    """Raises `DataError` if a member is chosen that no sample has."""
    members = _members(options)
    for flag, chosen, has in (
        ("--image-member", members.image, any(len(index) for index in found)),
        ("--label-member", members.label, any((index.labels != NO_LABEL).any() for index in found)),
    ):
        if chosen is not None and not has:
            problems = Problems()
            for index in found:
                problems.extend(index.problems)
            seen = problems.summary() or problems.passed_over()
            raise DataError(f"no sample has {flag} {chosen}{f' ({seen})' if seen else ''}; correct it or leave it out")


def _stats(options: argparse.Namespace) -> int:
    pixels, members = PixelFormat(options.channels, options.pixels), _members(options)
    reader = options.reader or reader_of(options.data)
    section = getattr(SOURCES.get(reader), "Config", DataConfig)
    data = section(
        reader=reader, train=options.data, batch_size=1, image_member=members.image, label_member=members.label
    )
    source = training_source(data, (0, 0))
    path = statistics_path(options.data)
    if path is None or isinstance(source, StreamSource):
        raise DataError(f"{options.data} is remote, so nothing can be written next to it; measure a local copy")
    terminal.say(source.summary())
    check_problems(source.problems(), source.num_samples, options.max_bad_fraction, limit="--max-bad-fraction")
    with _Progress(source.num_samples, "images") as progress:
        found = measure(
            source, pixels, workers=options.workers, max_bad_fraction=options.max_bad_fraction,
            progress=lambda done, bad: progress.show(done, f"{bad} left out"),
        )  # fmt: skip
    for name, values in (("mean", found.mean), ("std", found.std)):
        terminal.say(f"{name:<5} {', '.join(f'{value:.6g}' for value in values)}")
    write_statistics(found, path)
    counts = counted(found.images, "image")
    terminal.say(f"{path}: {counts} with {pixels}; augment.mean=null augment.std=null takes them")
    return 0


def _members(options: argparse.Namespace) -> Members:
    return Members(options.image_member, options.label_member)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "make": _make, "verify": _verify, "info": _info, "index": _index, "classes": _classes,
    "stats": _stats,
}  # fmt: skip


class _Progress:
    """A progress bar if standard error is a terminal, else a plain line every ten seconds."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit = total, unit
        self._bar = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._first: tuple[int, float] | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: int, text: str) -> None:
        """Updates the bar or, every ten seconds, prints a line."""
        now = time.monotonic()
        if self._bar is not None:
            if self._first is None:
                self._bar.initial = self._bar.n = done  # work of an earlier run doesn't count towards the speed
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._shown >= _LINE_EVERY_S:
            self._shown = now
            rate = (done - self._first[0]) / max(1e-9, now - self._first[1]) if self._first else 0.0
            pace = f", {rate:.0f} {self._unit}/s" if rate else ""
            print(f"{done} of {self._total} {self._unit}{pace}, {text}", file=sys.stderr, flush=True)
        self._first = self._first or (done, now)

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        tqdm.write(one_line(text), file=sys.stdout) if self._bar is not None else terminal.say(text)


__all__ = ["READERS", "add_arguments", "open_images", "run_command"]
