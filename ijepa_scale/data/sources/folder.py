"""Reads images from class folders."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.listing import (
    NO_CLASS,
    FolderListing,
    check_lone,
    chosen_split,
    folders_in,
    no_images,
    refuse_nested,
)
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError


class ImageFolderSource:
    """Images in class folders, numbered class by class, with the same labels as in torchvision's ImageFolder.

    If ROOT holds only splits (train, val, valid, validation, test), ROOT/train is read, which `summary` says. Folders
    that may be splits or hold the classes are refused, except in a root that ends in "/.", whose folders are always
    the classes. The whole set is one shard and is shuffled together, because files cost the same in any order.

    Raises:
        DataError: a folder can't be listed, has no images, or may not be a class.
    """

    def __init__(self, root: str | Path) -> None:
        self._problems = Problems()
        self.chosen_split: str | None = None
        self.root = Path(root)
        if not os.path.isdir(root):
            raise DataError(
                f"folder {root} doesn't exist or can't be reached; give the folder with CLASS/*.jpg in it, or its "
                "parent"
            )
        as_classes = str(root).endswith(f"{os.sep}.")
        if not as_classes:
            self.chosen_split = chosen_split(folders_in(self.root), f"folder {self.root}", self._give)
            self.root /= self.chosen_split or ""
            if self.chosen_split is not None:
                refuse_nested(folders_in(self.root), f"folder {self.root}", self._give)
        listing = FolderListing(self.root, self._problems)
        for name in listing.images(""):
            self._problems.add("no class", str(self.root / name), NO_CLASS)
        classes = listing.folders
        if not as_classes:
            check_lone(classes, any(map(listing.is_nested, classes)), f"folder {self.root}", self._give)
        self.classes: list[str] | None = classes
        self._take(listing, classes)

    def _give(self, folder: str) -> str:
        """Returns what to give to have a folder in the root read, or, for ".", the root's folders as classes."""
        return f"{self.root}{os.sep}{folder}"

    def _take(self, listing: FolderListing, classes: list[str]) -> None:
        """Numbers the images."""
        self._names = Names.of(itertools.chain.from_iterable(map(listing.images, classes)))
        counts = [listing.count(name) for name in classes]
        if 0 in counts:
            raise no_images(str(self.root / classes[counts.index(0)]), self._problems)
        if not classes:
            found = self._problems.summary() or self._problems.passed_over()
            raise DataError(
                f"folder {self.root} holds no class folders{f' ({found})' if found else ''}; give the folder with "
                "CLASS/*.jpg in it, or its parent"
            )
        self._class_ends = np.cumsum(counts)
        self.num_samples = len(self._names)
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
        """Returns the number of the class folder."""
        return int(np.searchsorted(self._class_ends, sample_id, side="right"))

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64."""
        return np.searchsorted(self._class_ends, np.arange(self.num_samples), side="right").astype(np.int64)

    def name(self, sample_id: int) -> str:
        """Returns the image's path."""
        return os.path.join(self.root, self._names[sample_id])

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single files are not prefetched."""

    def summary(self) -> str:
        """Returns the number of images and classes, and the split if one was chosen, for the log."""
        of = f" of {self.root}, the only one of the splits there that is read" if self.chosen_split else ""
        return f"{self.num_samples} images in {len(self.classes or ())} class folders{of}"

    def problems(self) -> Problems:
        """Returns the images that are in no class folder, and what was passed over."""
        return self._problems
