"""Reads image files from folders and CSV lists, to be made into shards. Doesn't decode them."""

from __future__ import annotations

import os
from pathlib import Path

from ijepa_scale.data.sources.file_list import ListSource
from ijepa_scale.data.sources.folder import ImageFolderSource


class FolderImages(ImageFolderSource):
    """Images in ROOT or ROOT/SPLIT, in class folders or without labels; see `ImageFolderSource`."""

    def __init__(self, root: str | Path, split: str | None = None, *, most_loose: float = 1.0) -> None:
        super().__init__(root if split is None else os.path.join(root, split), most_loose=most_loose)
        kind = "folder without labels" if self.classes is None else "class folders"
        self.origin = f"{kind} {os.path.abspath(self.root)}"


class CsvImages(ListSource):
    """The images that a CSV file lists, whatever its name; see `ListSource`."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, as_csv=True)


__all__ = ["CsvImages", "FolderImages"]
