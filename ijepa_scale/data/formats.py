"""What a file or folder is, by its name: an image that is read, another image, or an entry of a tool or a system.

Knows nothing of folders or pixels.
"""

from __future__ import annotations

import functools
import re

from PIL import Image, features

_SUFFIXES = {  # Pillow's format -> file suffixes, without the dot
    "JPEG": "jpg jpeg jpe jfif",
    "PNG": "png apng",
    "WEBP": "webp",
    "BMP": "bmp",
    "PPM": "ppm pgm pbm pnm pfm",
    "TIFF": "tif tiff",
    "GIF": "gif",
    "JPEG2000": "jp2 j2k j2c jpx",
    "AVIF": "avif",
}
_DATA_IMAGES = frozenset(("npy", "dcm", "dicom"))  # often something else that lies next to images
_OTHER_IMAGES = frozenset(
    "ai arw bpg cin cr2 cr3 cur dcm dcx dds dib dicom djvu dng dpx eps exr flif fit fits hdr heic heics heif heifs "
    "icns ico jbig jls jng jpf jxl jxr mng mpo nef nrw orf pcd pcx pef psb psd qoi raf ras raw rgb rw2 sgi srw svg "
    "svgz tga wbmp wdp wmf x3f xbm xcf xpm".split()
)
_ARCHIVES = frozenset("7z bz2 gz lz4 rar tar tbz tbz2 tgz txz tzst xz z zip zst".split())
_JUNK = frozenset(  # in lower case
    (
        "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r",
        "$recycle.bin", "recycler", "system volume information", "lost+found", "@eadir", "@recycle", "@tmp",
        "@recently-snapshot", "#recycle", "#snapshot",
    )
)  # fmt: skip
_SUFFIX = re.compile(r"[\w~-]{1,12}")
_UNTYPED = "no suffix"


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns the formats that this Pillow can read, in Pillow's names; JPEG is the first."""
    Image.init()
    return tuple(name for name in _SUFFIXES if name in Image.OPEN and name not in _undecodable())


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Returns the suffixes of files that are read as images, in lower case and without the dot."""
    return frozenset(suffix for name in formats() for suffix in _SUFFIXES[name].split())


def is_image(name: str) -> bool:
    """Returns whether a file of this name is read as an image."""
    _, dot, suffix = name.rpartition(".")
    return suffix.lower() in image_suffixes() and dot != ""


def is_data_image(name: str) -> bool:
    """Returns whether a file of this name is an image where no file next to it is one for sure: NPY and DICOM.

    A folder of photographs may hold features.npy, and a sample of a shard the embedding of its image.
    """
    return name.rpartition(".")[2].lower() in _DATA_IMAGES


def is_other_image(name: str) -> bool:
    """Returns whether a file of this name is an image of a format that isn't read."""
    suffix = name.rpartition(".")[2].lower()
    known = suffix in _OTHER_IMAGES or any(suffix in names.split() for names in _SUFFIXES.values())
    return known and "." in name and suffix not in image_suffixes()


def is_archive(name: str) -> bool:
    """Returns whether a file of this name is an archive or a compressed file."""
    stem, _, suffix = name.rpartition(".")
    return suffix.lower() in _ARCHIVES and stem != ""


def suffix_of(name: str) -> str:
    """Returns a file's suffix in lower case, with its dot, or a remark that it has none; for counts."""
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and _SUFFIX.fullmatch(suffix) else _UNTYPED


def junk(name: str) -> str | None:
    """Returns what an entry that belongs to a tool or a system is counted as; None for any other name."""
    if name[0] != "." and name.lower() not in _JUNK:
        return None
    if name.startswith("._"):  # attributes that macOS stores next to a file
        return "._*"
    return f".*{suffix_of(name)}" if name[0] == "." and is_image(name[1:]) else name


def junk_in(path: str) -> str | None:
    """Returns what the first such entry in a relative path is counted as; None if there is none."""
    found = (junk(part) for part in path.split("/") if part not in ("", "."))
    return next((kind for kind in found if kind is not None), None)


def _undecodable() -> set[str]:
    """Returns the formats that Pillow recognises but was built without."""
    needed = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
    return {name for name, feature in needed.items() if not features.check(feature)}


__all__ = [
    "formats", "image_suffixes", "is_archive", "is_data_image", "is_image", "is_other_image", "junk", "junk_in",
    "suffix_of",
]  # fmt: skip
