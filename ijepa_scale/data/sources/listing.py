"""Lists the images of a folder: the one walker, and the rules that folders, tars and shards share.

Entries of tools and systems are passed over and counted by name, images of other formats and other files by suffix.
Knows nothing of decoding or batches.
"""

from __future__ import annotations

import errno
import heapq
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ijepa_scale.data.formats import is_archive, is_data_image, is_image, junk
from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted

_SPLITS = ("train", "val", "valid", "validation", "test")
_LIKE_SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing)[-_ ]?(\d+|set|split|data|images?)?")
NO_CLASS = "isn't in a class folder; move it into one"
STATISTICS = "pixel_stats.json"  # what launch/shards.py stats writes next to the images
AS_CLASSES = "."  # ends a path whose folders are always the classes
ALL_IMAGES = "**"  # ends a path below which all images are read, without labels


def chosen_split(folders: Iterable[str], place: str, give: Callable[[str], str]) -> str | None:
    """Returns "train" if there are only splits, among them train; None if none of the folders looks like a split.

    `place` names what holds the folders, and `give` returns what to give instead for one of them, or for ".".

    Raises:
        DataError: some of the folders look like splits, so they can't be told from classes.
    """
    names = sorted(folders)
    alike = [name for name in names if _LIKE_SPLIT.fullmatch(name.casefold())]
    if not alike:
        return None
    if "train" in alike and set(names) <= set(_SPLITS):
        return "train"
    wanted = min(alike, key=lambda name: (not name.casefold().startswith("train"), name))
    others = [name for name in names if name not in alike]
    found = f"folders named like splits ({few(alike)})" + (f" next to others ({few(others)})" if others else "")
    raise DataError(
        f"{place} holds {found}; give {give(wanted)} for that split, or {give(AS_CLASSES)} if these folders are "
        f"the classes{_or_all(give)}"
    )


def refuse_nested(folders: Iterable[str], place: str, give: Callable[[str], str]) -> None:
    """Refuses splits in a folder that was itself chosen among splits. One class may be called `train`.

    Raises:
        DataError: all its folders are called like splits; names what to give.
    """
    names = sorted(folders)
    if len(names) > 1 and set(names) <= set(_SPLITS):
        raise DataError(
            f"{place} was chosen among splits and holds splits itself ({few(names)}); give {give(names[0])} for one of "
            f"them, or {give(AS_CLASSES)} if these folders are the classes{_or_all(give)}"
        )


def check_lone(classes: list[str], nested: bool, place: str, give: Callable[[str], str]) -> None:
    """Checks that a lone class folder isn't the folder that the classes are in.

    `nested` tells whether folders in it hold images; `place` and `give` are those of `chosen_split`.

    Raises:
        DataError: it may be.
    """
    if len(classes) == 1 and nested:
        raise DataError(
            f"all images of {place} are in its folder {classes[0]!r}; give {give(classes[0])} if the folders in it are "
            f"the classes, or {give(AS_CLASSES)} if it is the only class{_or_all(give)}"
        )


def has_no_classes(loose: int, inside: int, most_loose: float) -> bool:
    """Returns whether the images in a root itself say that the folders in it aren't classes.

    They do if there are no others, or if they are more than the share `most_loose` of all, which is what a set of
    classes may lose. `loose` counts them, and `inside` the images in the root's folders.
    """
    return loose > 0 and (inside == 0 or loose > most_loose * (loose + inside))


def doubt_classes(place: str, loose: int, inside: int, give: Callable[[str], str]) -> str:
    """Returns what to check about a root that is read without labels though there are folders with images in it."""
    return (
        f"{place} is read without labels, because it has images in no folder ({loose} of {loose + inside}); give "
        f"{give(AS_CLASSES)} if its folders are the classes"
    )


def describe_unlabelled(num_samples: int, loose: int, place: str) -> str:
    """Returns what a root was read as, for the log."""
    where = "" if loose in (0, num_samples) else f"; {loose} of them in no folder"
    return f"{counted(num_samples, 'image')} without labels in {place}{where}"


def no_images(folder: str, problems: Problems, give: Callable[[str], str]) -> DataError:
    """Returns the error that a class folder has no image."""
    found = problems.passed_over()
    return DataError(
        f"class folder {folder} holds no image that can be read{f' (passed over: {found})' if found else ''}; drop it, "
        f"or convert its files to JPEG or PNG{_or_all(give)}"
    )


def doubt_archive(path: str) -> str:
    """Returns what to check about an archive among class folders."""
    return (
        f"archive {path} is in a class's place and isn't read, so classes are numbered without it; unpack it if it is "
        "a class"
    )


def doubt_link(path: str) -> str:
    """Returns what to check about a link, among class folders, to a folder that is listed anyway."""
    return (
        f"link {path} is in a class's place, but leads to a folder that is listed anyway, so it is no class and "
        "classes are numbered without it (torchvision's ImageFolder counts it as one); put a copy of the folder in its "
        "place if it is a class"
    )


def lost_link(path: str, remedy: str, where: str = "") -> DataError:
    """Returns the error that a link in a class's place leads to nothing that can be read, or to nothing `where`."""
    return DataError(
        f"link {path} leads to nothing{where}, so a class may be missing and labels would be counted without it; "
        f"{remedy}"
    )


def _or_all(give: Callable[[str], str]) -> str:
    return f", or {give(ALL_IMAGES)} to read all images without labels"


def few(names: Iterable[str]) -> str:
    """Returns the first names, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:5])
    return f"{shown} and {len(ordered) - 5} more" if len(ordered) > 5 else shown or "none"


def root_of(path: str | Path) -> Path:
    """Returns the folder that a path names which may end in `AS_CLASSES` or `ALL_IMAGES`."""
    path = Path(path)  # drops a "." at the end
    return path.parent if path.name == ALL_IMAGES else path


def asked_for(path: str | Path) -> str | None:
    """Returns `AS_CLASSES` or `ALL_IMAGES` if the path ends in it, else None."""
    if Path(path).name == ALL_IMAGES:
        return ALL_IMAGES
    return AS_CLASSES if str(path).endswith(f"{os.sep}{AS_CLASSES}") else None


def folders_in(root: Path) -> list[str]:
    """Returns the names of the folders, and of links to folders, in a folder.

    Raises:
        DataError: it can't be listed.
    """
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if junk(entry.name) is None and _is_folder(entry)]
    except OSError as error:
        raise _unlistable(root, error) from None


def images_below(folder: str) -> tuple[list[str], Problems]:
    """Returns the paths of all images in a folder and below it, and what was passed over.

    Raises:
        DataError: a folder can't be listed, or there is no image.
    """
    problems = Problems()
    listing = FolderListing(Path(folder), problems)
    paths = [os.path.join(folder, name) for name in listing.all_images()]
    if not paths:
        raise DataError(f"folder {folder} holds no image (found: {problems.passed_over() or 'nothing'}); name others")
    return paths, problems


class FolderListing:
    """The images below a folder, by the folder they are in; links are followed.

    Each real folder is listed once: under its own path if that is below the root, else under the first link to it. So
    a link to a folder that is listed anyway, or to one around the root, adds nothing and is counted. Dangling links and
    special files with an image's name are listed; reading them fails.

    Raises:
        DataError: the root or a folder below it can't be listed.
    """

    def __init__(self, root: Path, problems: Problems) -> None:
        self.root, self._problems = root, problems
        self._dangling: list[str] = []  # in the root: links to nothing, without an image's name
        self._archives: list[str] = []  # in the root
        self._repeated: list[str] = []  # in the root: links to folders that are listed anyway
        self._images: dict[str, str] = {}  # folder -> sorted names, joined by slashes to save memory
        self._real: list[str] = []  # folders still to be listed
        self._links: list[str] = []  # links to folders, to be followed when no real one is left; a heap
        self._tops: dict[str, list[str]] = {}  # folder in the root, or "" -> folders with images
        self._data_images: dict[str, list[str]] = {}  # folder -> names of NPY and DICOM files
        self._walk()
        self._take_data_images()

    @property
    def folders(self) -> list[str]:
        """The names of the folders in the root, sorted."""
        return sorted(top for top in self._tops if top)

    def images(self, top: str) -> Iterator[str]:
        """Yields the paths of the images below a folder in the root, relative to the root, in torchvision's order.

        For "" yields the names of the images that are in the root itself.
        """
        for folder in sorted(self._tops.get(top, ())):
            prefix = f"{folder}/" if folder else ""
            yield from (prefix + name for name in self._images[folder].split("/"))

    def all_images(self) -> Iterator[str]:
        """Yields the paths of all images: those in the root itself first, then folder by folder."""
        return (name for top in ("", *self.folders) for name in self.images(top))

    def count(self, top: str) -> int:
        """Returns the number of images below a folder in the root; for "" of those that are in the root itself."""
        return sum(self._images[folder].count("/") + 1 for folder in self._tops[top])

    def check_classes(self) -> None:
        """Call if the folders in the root are classes: notes what may be one and isn't read.

        Raises:
            DataError: a link in a class's place leads to nothing.
        """
        for name in sorted(self._dangling):
            raise lost_link(str(self.root / name), "restore what it leads to, or remove the link")
        self._problems.doubts += [doubt_link(str(self.root / name)) for name in sorted(self._repeated)]
        self._problems.doubts += [doubt_archive(str(self.root / name)) for name in sorted(self._archives)]

    def is_nested(self, top: str) -> bool:
        """Returns whether folders below a folder in the root hold images."""
        return any(folder != top for folder in self._tops[top])

    def _walk(self) -> None:
        around = {self._identity(folder) for folder in (self.root.resolve(), *self.root.resolve().parents)}
        self._list("")
        seen: set[tuple[int, int]] = set()
        while self._real or self._links:
            folder = self._real.pop() if self._real else heapq.heappop(self._links)
            identity = self._identity(folder)
            if identity in seen or identity in around:
                self._problems.skipped[f"link {folder} to a folder that is listed anyway"] += 1
                self._repeated += [folder] * ("/" not in folder)
                continue
            seen.add(identity)
            self._list(folder)

    def _take_data_images(self) -> None:
        """Lists NPY and DICOM files if there are no other images; else passes them over."""
        alone = not self._images
        for folder, names in self._data_images.items():
            if alone:
                self._keep(folder, names)
            else:
                for name in names:
                    self._problems.pass_over(name)

    def _keep(self, folder: str, images: list[str]) -> None:
        self._images[folder] = "/".join(sorted(images))
        self._tops.setdefault(folder.partition("/")[0], []).append(folder)

    def _identity(self, folder: str | Path) -> tuple[int, int]:
        """Returns the device and inode of a folder, relative to the root or absolute."""
        path = self.root / folder
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unlistable(path, error) from None
        return status.st_dev, status.st_ino

    def _list(self, folder: str) -> None:
        """Lists one folder: keeps its images, counts what it passes over, and notes the folders in it."""
        path, images, real, data_images = os.path.join(self.root, folder), [], [], []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] != "." and is_image(name) and not _is_folder(entry):  # nearly always
                        images.append(name)
                    elif (useless := junk(name)) is not None:
                        self._problems.skipped[useless] += 1
                    elif _is_folder(entry):
                        inner = os.path.join(folder, name)
                        real.append(inner) if not entry.is_symlink() else heapq.heappush(self._links, inner)
                    elif is_data_image(name):
                        data_images.append(name)
                    elif folder or name != STATISTICS:
                        self._problems.pass_over(name)
                        if not folder and entry.is_symlink() and not os.path.exists(entry.path):
                            self._dangling.append(name)
                        elif not folder and is_archive(name):
                            self._archives.append(name)
        except OSError as error:
            raise _unlistable(path, error) from None
        self._real += sorted(real, reverse=True)
        self._tops.setdefault(folder.partition("/")[0], [])
        if images:
            self._keep(folder, images)
        if data_images:
            self._data_images[folder] = data_images


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _unlistable(path: str | Path, error: OSError) -> DataError:
    return DataError(
        f"folder {path} can't be listed ({error.strerror}), so its images would be missing; fix its permissions or the "
        "disk, or move it away"
    )


__all__ = [
    "ALL_IMAGES", "AS_CLASSES", "NO_CLASS", "STATISTICS", "FolderListing", "asked_for", "check_lone", "chosen_split",
    "describe_unlabelled", "doubt_archive", "doubt_classes", "doubt_link", "few", "folders_in", "has_no_classes",
    "images_below", "lost_link", "no_images", "refuse_nested", "root_of",
]  # fmt: skip
