"""Reads images from class folders."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.data.sources.tar_index import Names
from ijepa_scale.errors import DataError

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
SPLITS = {"train", "val", "valid", "validation", "test"}


class ImageFolderSource:
    """Images in class folders, numbered class by class, with the same labels as in torchvision's ImageFolder.

    If ROOT holds only splits (train, val, test), ROOT/train is read. The whole set is one shard and is shuffled
    together, because files cost the same in any order.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = _class_root(Path(root))
        classes = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
        self.classes: list[str] | None = classes
        names: list[str] = []
        counts: list[int] = []
        for name in classes:
            found = _images(self.root, name)
            if not found:
                raise DataError(
                    f"class folder {self.root / name} holds no image ({', '.join(FOLDER_SUFFIXES)}); drop it"
                )
            names += found
            counts.append(len(found))
        if not names:
            raise DataError(
                f"folder {self.root} holds no class folders; give the folder with CLASS/*.jpg in it, or its parent"
            )
        self._names = Names.of(names)
        self._class_ends = np.cumsum(counts)
        self.num_samples = len(names)
        self.shard_sizes = np.array([len(names)], dtype=np.int64)
        digest = hashlib.sha256(self._names.blob.tobytes())
        digest.update(self._names.ends.tobytes())
        self.fingerprint = digest.hexdigest()

    def read(self, sample_id: int) -> bytes:
        """Returns the encoded image.

        Raises:
            DataError: the file can't be read.
        """
        path = self.root / self._names[sample_id]
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"image {path} can't be read ({error.strerror}); check the path and the disk") from None

    def label(self, sample_id: int) -> int:
        """Returns the number of the class folder."""
        return int(np.searchsorted(self._class_ends, sample_id, side="right"))

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64."""
        return np.searchsorted(self._class_ends, np.arange(self.num_samples), side="right").astype(np.int64)

    def name(self, sample_id: int) -> str:
        """Returns the image's path."""
        return str(self.root / self._names[sample_id])

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: single files are not prefetched."""

    def summary(self) -> str:
        """Returns the number of images and classes, for the log."""
        return f"{self.num_samples} images in {len(self.classes or ())} class folders"

    def problems(self) -> Problems:
        """Returns no problems: only images are listed."""
        return Problems()


def _class_root(root: Path) -> Path:
    """Returns the folder whose sub-folders are the classes."""
    if not root.is_dir():
        raise DataError(f"folder {root} doesn't exist; give the folder with CLASS/*.jpg in it, or its parent")
    folders = {entry.name for entry in root.iterdir() if entry.is_dir()}
    return root / "train" if "train" in folders and folders <= SPLITS else root


def _images(root: Path, folder: str) -> list[str]:
    """Returns the paths of the images below a class folder, relative to `root` and in torchvision's order."""
    found = []
    for parent, _, files in sorted(os.walk(root / folder, followlinks=True)):
        relative = os.path.relpath(parent, root)
        found += [os.path.join(relative, file) for file in sorted(files) if file.lower().endswith(FOLDER_SUFFIXES)]
    return found
