"""Reads images from class folders, or from a folder without labels."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.labels import NO_LABEL
from ijepa_scale.data.sources.listing import (
    ALL_IMAGES,
    AS_CLASSES,
    NO_CLASS,
    FolderListing,
    asked_for,
    check_lone,
    chosen_split,
    describe_unlabelled,
    doubt_classes,
    folders_in,
    has_no_classes,
    no_images,
    refuse_nested,
    root_of,
)
from ijepa_scale.data.sources.mistaken import mistaken
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted


class ImageFolderSource:
    """Images in class folders, with the same labels as in torchvision's ImageFolder, or in a folder without labels.

    If ROOT holds only splits (train, val, valid, validation, test), ROOT/train is read, which `summary` says. Folders
    that may be splits or hold the classes are refused. The folders in ROOT are its classes, unless it holds images
    itself: if there are no others, or if they are more than the share `most_loose` of all, all images below ROOT are
    read without labels. A root that ends in "/." always has classes, one that ends in "/**" never has labels.

    The whole set is one shard and is shuffled together, because files cost the same in any order.

    Raises:
        DataError: a folder can't be listed, has no images, or may not be a class.
    """

    def __init__(self, root: str | Path, *, most_loose: float = 1.0) -> None:
        self._problems = Problems()
        self.chosen_split: str | None = None
        self.root = root_of(root)
        if not os.path.isdir(self.root):
            raise mistaken(self.root, "imagefolder") or DataError(
                f"folder {self.root} doesn't exist or can't be reached; give the folder with CLASS/*.jpg in it, its "
                "parent, or a folder of images without classes"
            )
        asked = asked_for(root)
        if asked is None:
            self.chosen_split = chosen_split(folders_in(self.root), f"folder {self.root}", self._give)
            self.root /= self.chosen_split or ""
            if self.chosen_split is not None:
                refuse_nested(folders_in(self.root), f"folder {self.root}", self._give)
        listing = FolderListing(self.root, self._problems)
        self._loose = listing.count("")
        inside = sum(map(listing.count, listing.folders))
        self.classes: list[str] | None = None
        self._class_ends: np.ndarray | None = None
        if asked == ALL_IMAGES or (asked != AS_CLASSES and has_no_classes(self._loose, inside, most_loose)):
            if asked != ALL_IMAGES and inside:
                doubt = doubt_classes(f"folder {self.root}", self._loose, inside, self._give)
                self._problems.doubts.append(doubt)
            self._number(listing.all_images())
        else:
            self._take_classes(listing, sure=asked == AS_CLASSES)

    def _give(self, folder: str) -> str:
        """Returns what to give to have a folder in the root read, or its folders as classes, or all its images."""
        return f"{self.root}{os.sep}{folder}"

    def _take_classes(self, listing: FolderListing, *, sure: bool) -> None:
        """Numbers the images of class folders. `sure` tells whether a lone folder is a class."""
        listing.check_classes()
        for name in listing.images(""):
            self._problems.add("no class", str(self.root / name), NO_CLASS)
        classes = listing.folders
        if not sure:
            check_lone(classes, any(map(listing.is_nested, classes)), f"folder {self.root}", self._give)
        counts = [listing.count(name) for name in classes]
        if 0 in counts:
            raise no_images(str(self.root / classes[counts.index(0)]), self._problems, self._give)
        if classes:
            self.classes, self._class_ends = classes, np.cumsum(counts)
        self._number(itertools.chain.from_iterable(map(listing.images, classes)))

    def _number(self, names: Iterable[str]) -> None:
        """Numbers the images."""
        self._names = Names.of(names)
        self.num_samples = len(self._names)
        if not self.num_samples:
            found = self._problems.summary() or self._problems.passed_over()
            raise DataError(
                f"folder {self.root} holds no class folders and no images outside them"
                f"{f' ({found})' if found else ''}; give the folder with CLASS/*.jpg in it, its parent, or a folder of "
                "images"
            )
        self.shard_sizes = np.array([self.num_samples], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.data)
        digest.update(self._names.ends.data)
        self.fingerprint = digest.hexdigest()

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            SampleError: it is missing, isn't a regular file, is empty or too large.
            DataError: the file can't be read.
        """
        return read_image_file(self.name(sample_id))

    def label(self, sample_id: int) -> int:
        """Returns the number of the class folder; -1 if there are no labels."""
        if self._class_ends is None:
            return NO_LABEL
        return int(np.searchsorted(self._class_ends, sample_id, side="right"))

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there are none."""
        if self._class_ends is None:
            return np.full(self.num_samples, NO_LABEL, dtype=np.int64)
        return np.searchsorted(self._class_ends, np.arange(self.num_samples), side="right").astype(np.int64)

    def name(self, sample_id: int) -> str:
        """Returns the image's path."""
        return os.path.join(self.root, self._names[sample_id])

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single files are not prefetched."""

    def summary(self) -> str:
        """Returns what the folder was read as, and the split if one was chosen, for the log."""
        split = ", the only one of the splits there that is read" if self.chosen_split else ""
        if self.classes is None:
            return describe_unlabelled(self.num_samples, self._loose, f"folder {self.root}") + split
        of = f" of {self.root}{split}" if split else ""
        return f"{counted(self.num_samples, 'image')} in {counted(len(self.classes), 'class folder')}{of}"

    def problems(self) -> Problems:
        """Returns the images that are in no class folder, and what was passed over."""
        return self._problems
