"""Photographs with a map of answers each: finds the pairs, checks them and reads them. Knows nothing of encoders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.deep_decode import decode_as, resize_deep
from ijepa_scale.data.pil_decode import orientation_of
from ijepa_scale.data.sources.class_list import read_classes
from ijepa_scale.data.sources.labels import NO_LABEL
from ijepa_scale.data.sources.listing import few, images_below
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.workers import ordered_loader
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.array_file import opened, write_array
from ijepa_scale.evaluate.dense.map_files import IGNORED, decode_depth, decode_mask, nearest
from ijepa_scale.evaluate.features import local_ids

Kind = Literal["masks", "depth"]
_CALLED = {"masks": "mask", "depth": "depth map"}
_NAMED = 5  # bad pairs in an error
_READ = 8  # pairs that a worker reads at once
_VOC = "ImageSets/Segmentation"


class MapFolder:
    """Photographs and their maps, in the order of the photographs' paths. A `SampleSource` without labels.

    A photograph is turned as its EXIF orientation says, and resized whole to `image_size`, so its sides may change in
    proportion, but no pixel is left out.

    Attributes:
        kind: masks or depth.
        depth_scale: the integer that stands for a depth of 1, of maps in PNG.
        classes: names by class index, of the file classes.json; None if there is none.
        num_classes: classes that masks may have; None for any. Set it before checking another set by this one's.
    """

    def __init__(
        self,
        path: str,
        kind: Kind,
        *,
        image_size: tuple[int, int],
        pixels: PixelFormat = RGB8,
        depth_scale: float | None = None,
    ) -> None:
        self.path, self.kind, self.depth_scale = path, kind, depth_scale
        self.image_size, self._pixels = image_size, pixels
        found = _found(path, kind)
        self._photographs, self._maps, self._unused, self._passed = _paired(found, _CALLED[kind])
        self._first_class = found.first_class
        self.classes = read_classes(found.root) if kind == "masks" else None
        self.num_classes = None if self.classes is None else len(self.classes)
        self.num_samples = len(self._photographs)
        self.shard_sizes = np.array([self.num_samples], dtype=np.int64)
        names = "\n".join(os.path.relpath(name, found.photographs) for name in self._photographs)
        self.fingerprint = hashlib.sha256(f"{image_size} {names}".encode(errors="surrogateescape")).hexdigest()

    def read(self, sample_id: int) -> np.ndarray:
        """Returns the pixels of a photograph, (h, w, C) of the encoder's type of values."""
        return self._resized(decode_as(self._pixels, read_image_file(self.name(sample_id)), "apply"))

    def read_map(self, sample_id: int) -> np.ndarray:
        """Returns the map at its own size: (H, W) class indices uint8, 255 for none, or depths float32, NaN for none.

        Raises:
            DataError: it can't be read or decoded.
        """
        data = read_image_file(self.map_name(sample_id))
        if self.kind == "depth":
            return decode_depth(data, self.depth_scale)
        mask = decode_mask(data)
        if self._first_class:  # 0 is no class
            mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1).astype(np.uint8)
        return mask

    def check(self, sample_id: int) -> Checked:
        """Reads a pair, and returns what is in it, or what is wrong with it."""
        name = self.name(sample_id)
        try:
            data = read_image_file(name)
            seen = decode_as(self._pixels, data, "apply").shape[:2]
            name = self.map_name(sample_id)
            values = self.read_map(sample_id)
        except DataError as error:
            return Checked(problem=f"{name} ({error})")
        orientation = orientation_of(data)
        problem = self._problem(values, seen, orientation)
        if problem is not None:
            return Checked(problem=f"{name} ({problem})")
        if self.kind == "depth":
            return Checked(turned=orientation != 1, lowest=float(np.nanmin(values)), highest=float(np.nanmax(values)))
        return Checked(turned=orientation != 1, classes=np.setdiff1d(values, IGNORED).tolist())

    def _problem(self, values: np.ndarray, seen: tuple[int, ...], orientation: int) -> str | None:
        called = _CALLED[self.kind]
        if values.shape != seen:
            sizes = f"{values.shape[1]} x {values.shape[0]} pixels, its photograph {seen[1]} x {seen[0]}"
            if orientation > 4 and values.shape == seen[::-1]:
                return (
                    f"{sizes}, because its EXIF orientation {orientation} turns it; turn the {called} too, or remove "
                    "the orientation"
                )
            return f"{sizes}; give both the same size"
        known = values[np.isfinite(values)] if self.kind == "depth" else values[values != IGNORED]
        if not len(known):
            return "no pixel of it has a value; drop it and its photograph"
        if self.kind == "masks" and self.num_classes is not None and known.max() >= self.num_classes:
            first = self._first_class
            return (
                f"class {known.max() + first}, but there are {self.num_classes} ({first} to "
                f"{self.num_classes - 1 + first}); fix it, or give the number with --classes"
            )
        return None

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[:2] == self.image_size:
            return pixels
        if self._pixels.is_rgb8:
            size = self.image_size[::-1]
            return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC))
        return resize_deep(pixels, self.image_size, Image.Resampling.BICUBIC)

    def name(self, sample_id: int) -> str:
        """Returns the photograph's path."""
        return self._photographs[sample_id]

    def map_name(self, sample_id: int) -> str:
        """Returns the map's path."""
        return self._maps[sample_id]

    def label(self, sample_id: int) -> int:
        """Returns -1: a photograph has no label of its own."""
        return NO_LABEL

    def labels(self) -> np.ndarray:
        """Returns -1 for each photograph."""
        return np.full(self.num_samples, NO_LABEL, dtype=np.int64)

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single files are not prefetched."""

    def problems(self) -> Problems:
        """Returns none: a photograph without its map is an error."""
        return Problems()

    def summary(self) -> str:
        """Returns what was found, for the log."""
        unused = f"; {self._unused} {_CALLED[self.kind]}s have no photograph" if self._unused else ""
        passed = f"; not read: {self._passed}" if self._passed else ""
        return f"{self.num_samples} photographs with {_CALLED[self.kind]}s in {self.path}{unused}{passed}"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is in a pair, or in all pairs of a set, and what is wrong with one."""

    problem: str | None = None
    turned: int = 0  # photographs that EXIF turns
    classes: list[int] | None = None  # that masks have, ascending
    lowest: float = np.inf  # depth
    highest: float = -np.inf


def check_maps(source: MapFolder, name: str, *, world: World, workers: int = 0) -> Checked:
    """Reads all pairs once, and returns what is in them, on every process. Communicates: each process reads its part.

    Raises:
        DataError: some can't be used, on all processes the same.
    """
    part = local_ids(np.arange(source.num_samples), world.rank, world.size)
    parts = [part[begin : begin + _READ] for begin in range(0, len(part), _READ)]
    loaded = ordered_loader(_Each(source.check), parts, workers=workers, prefetch=2)
    shown = tqdm(
        loaded, total=len(parts), unit="pair", unit_scale=_READ, desc=f"{name}: checking",
        disable=None if world.is_main else True, dynamic_ncols=True,
    )  # fmt: skip
    mine = [each for checked in shown for each in checked]
    found = cast("list[list[Checked]]", world.gather_objects(mine))
    every = [each for checked in found for each in checked][: source.num_samples]  # the rest is padding
    bad = [each.problem for each in every if each.problem is not None]
    if bad:
        shown = "; ".join(bad[:_NAMED]) + (f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")
        raise DataError(f"{name}: {len(bad)} of {len(every)} pairs can't be used; fix or drop them: {shown}")
    return Checked(
        turned=sum(each.turned for each in every),
        classes=sorted({index for each in every for index in each.classes or ()}),
        lowest=min(each.lowest for each in every),
        highest=max(each.highest for each in every),
    )


def training_maps(source: MapFolder, path: Path, *, workers: int = 0) -> np.ndarray:
    """Returns the maps (N, h, w) at the size of the encoder's images, memory-mapped from `path`, made if need be.

    Call it on one process only.
    """
    if opened(path, source.num_samples) is None:
        kind = np.uint8 if source.kind == "masks" else np.float32
        maps = read_maps(source, source.image_size, workers=workers)
        write_array(
            path,
            (source.num_samples, *source.image_size),
            (values[None].astype(kind, copy=False) for values in maps),
        )
    return np.load(path, mmap_mode="r")


def read_maps(source: MapFolder, size: tuple[int, int] | None = None, *, workers: int = 0) -> Iterator[np.ndarray]:
    """Yields the maps (H, W) in order, at their own size or at `size`, read by `workers` processes."""
    parts = np.array_split(np.arange(source.num_samples), -(-source.num_samples // _READ))
    for part in ordered_loader(_Each(partial(_read, source, size)), parts, workers=workers, prefetch=2):
        yield from part


def _read(source: MapFolder, size: tuple[int, int] | None, sample_id: int) -> np.ndarray:
    values = source.read_map(sample_id)
    return values if size is None else nearest(values, size)


class _Each(Dataset):
    """Maps ids to the list of what a function returns for each."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function

    def __getitem__(self, ids: np.ndarray) -> list[Any]:
        return [self._function(sample) for sample in ids.tolist()]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Where the photographs and the maps are."""

    root: Path  # may hold classes.json
    photographs: Path
    maps: Path
    first_class: int = 0  # of masks; lower indices are no class
    names: list[str] | None = None  # None: all photographs


def _found(path: str, kind: Kind) -> _Found:
    """Returns what a path stands for: a folder of ours, or one of VOC's lists or ADE20K's splits for masks."""
    given = Path(path)
    if kind == "masks" and given.is_file() and given.parent.as_posix().endswith(_VOC):
        root = given.parents[2]
        names = given.read_text().split()
        return _Found(root=root, photographs=root / "JPEGImages", maps=root / "SegmentationClass", names=names)
    annotations = given.parent.parent / "annotations" / given.name
    if kind == "masks" and given.parent.name == "images" and given.is_dir() and annotations.is_dir():
        return _Found(root=given.parent.parent, photographs=given, maps=annotations, first_class=1)
    for needed in ("images", kind):
        if not (given / needed).is_dir():
            others = f", a list of VOC ({_VOC}/train.txt) or a split of ADE20K (images/training)"
            wanted = f"a folder with images and {kind}{others if kind == 'masks' else ''}"
            raise DataError(f"{path} has no folder {needed}; give {wanted}")
    return _Found(root=given, photographs=given / "images", maps=given / kind)


def _paired(found: _Found, called: str) -> tuple[list[str], list[str], int, str]:
    """Returns the paths of photographs and of their maps, how many maps have no photograph, and what isn't read."""
    photographs, passed = _by_stem(found.photographs)
    maps, _ = _by_stem(found.maps)
    wanted = sorted(photographs) if found.names is None else found.names
    if not wanted:
        raise DataError(f"the list of photographs in {found.photographs} names none; give another list")
    for folder, there, kind in ((found.photographs, photographs, "photograph"), (found.maps, maps, called)):
        missing = [stem for stem in wanted if stem not in there]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(wanted)} photographs have no {kind} of their name in {folder} (no "
                f"{few(missing)}, whatever the suffix); add them, or drop these photographs"
            )
    unused = 0 if found.names is not None else len(maps) - len(wanted)
    return [photographs[stem] for stem in wanted], [maps[stem] for stem in wanted], unused, passed


def _by_stem(folder: Path) -> tuple[dict[str, str], str]:
    """Returns the paths of all images below a folder by their paths in it, without suffix, and what isn't read."""
    paths: dict[str, str] = {}
    found, problems = images_below(str(folder))
    for path in found:
        stem = os.path.splitext(os.path.relpath(path, folder))[0]
        if stem in paths:
            raise DataError(f"{paths[stem]} and {path} differ by their suffixes only; rename or drop one of them")
        paths[stem] = path
    return paths, problems.passed_over()
