"""Finds or downloads Fashion-MNIST for the demonstration, checks it, and writes it as tar shards.

70,000 images of 28 x 28 pixels in 10 classes, MIT licence. Knows nothing of training.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST", arXiv 1708.07747.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from ijepa_scale.config.json_text import parse_json
from ijepa_scale.errors import DataError

log = logging.getLogger(__name__)

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPLITS = {"train": "train", "test": "t10k"}  # our name: the files' prefix
# SHA-256 of the uncompressed files, from Debian's package 0.0~git20200523.55506a9-1
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MANIFEST = "manifest.json"
CLASSES_FILE = "classes.json"
FEW_PER_CLASS = 50
_LARGEST_FILE = 64 * 2**20  # bytes, uncompressed; the largest of the four has 47 MB
_APT_TIMEOUT_S = 300


def fetch(folder: str | Path | None = None, *, download_to: str | Path = "datasets/downloads") -> Path:
    """Returns the folder that holds the four IDX files, plain or .gz, after checking their hashes.

    If `folder` is given, no other source is tried. Else uses Debian's package, which it installs if apt-get and root
    are available; if that fails, uses torchvision's downloader, into `download_to`.

    Raises:
        DataError: no source works, or the files aren't Fashion-MNIST's.
    """
    if folder is not None:
        return _checked(Path(folder))
    tried = []
    for source in (_from_debian, lambda: _from_torchvision(Path(download_to))):
        try:
            return _checked(source())
        except (OSError, RuntimeError, subprocess.SubprocessError, DataError) as error:
            tried.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    raise DataError(
        f"Fashion-MNIST can't be fetched on this machine ({'; '.join(tried)}); "
        f"put its four idx-ubyte files (plain or .gz) in a folder and run: make demo FASHION_MNIST=FOLDER"
    )


def _from_debian() -> Path:
    """Returns the folder of Debian's package, which it installs if it is missing."""
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise DataError(f"Debian's {DEBIAN_PACKAGE} needs apt-get and root")
    log.info("installing Debian's %s (31 MB)", DEBIAN_PACKAGE)
    for command in (["update"], ["install", "-y", "--no-install-recommends", DEBIAN_PACKAGE]):
        done = subprocess.run(
            ["apt-get", "-q", *command], capture_output=True, text=True, timeout=_APT_TIMEOUT_S, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"apt-get {command[0]} failed: {reason}")
    return DEBIAN_FOLDER


def _from_torchvision(folder: Path) -> Path:
    """Downloads the files with torchvision and returns their folder."""
    from torchvision.datasets import FashionMNIST  # takes 2 s to import

    log.info("downloading Fashion-MNIST with torchvision (31 MB)")
    return Path(FashionMNIST(str(folder), download=True).raw_folder)


def _read(folder: Path, name: str) -> bytes:
    """Returns the uncompressed bytes of an IDX file that is stored in `folder`, plain or as .gz."""
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise DataError(f"{plain} is missing, and so is {packed.name}; give a folder with Fashion-MNIST's four files")
    try:
        with plain.open("rb") if plain.exists() else gzip.open(packed) as file:
            content = file.read(_LARGEST_FILE + 1)
    except (OSError, EOFError) as error:
        raise DataError(f"{folder / name} can't be read ({error}); fetch the file again") from error
    if len(content) > _LARGEST_FILE:
        raise DataError(f"{folder / name} holds more than {_LARGEST_FILE} bytes; Fashion-MNIST's files don't")
    return content


def _checked(folder: Path) -> Path:
    """Returns `folder` if its four files have the known hashes."""
    for name, expected in SHA256.items():
        found = hashlib.sha256(_read(folder, name)).hexdigest()
        if found != expected:
            raise DataError(
                f"{folder / name} has SHA-256 {found[:12]}… instead of Fashion-MNIST's {expected[:12]}…; "
                "fetch the file again"
            )
    return folder


def read_idx(content: bytes, name: str) -> np.ndarray:
    """Returns the uint8 array in an IDX file's bytes. `name` is for messages.

    Raises:
        DataError: the header doesn't match the length.
    """
    num_dims = content[3] if len(content) >= 4 and content[:3] == b"\0\0\x08" else 0
    shape = (
        tuple(int(n) for n in np.frombuffer(content, ">u4", num_dims, 4)) if len(content) >= 4 + 4 * num_dims else ()
    )
    if not num_dims or len(content) != 4 + 4 * num_dims + int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{name} ({len(content)} bytes) isn't an IDX file of bytes, or is cut short; fetch it again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def load(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images (N, 28, 28) and labels (N,) of a split, uint8. `split` is train or test.

    Raises:
        DataError: a file is missing or damaged, or the two don't belong together.
    """
    names = f"{SPLITS[split]}-images-idx3-ubyte", f"{SPLITS[split]}-labels-idx1-ubyte"
    images, labels = (read_idx(_read(folder, name), name) for name in names)
    if images.ndim != 3 or labels.shape != images.shape[:1] or (labels >= len(CLASSES)).any():
        raise DataError(
            f"{folder}: images {images.shape} and labels {labels.shape} of {split} don't belong together; "
            "fetch the files again"
        )
    return images, labels


def write_fashion_mnist_shards(
    source: str | Path, to: str | Path, *, train_shards: int = 4, test_shards: int = 1
) -> Path:
    """Writes train/0000.tar …, test/0000.tar …, few/0000.tar and a manifest into folder `to`, and returns it.

    `few` holds the first `FEW_PER_CLASS` training images of each class, for finetuning. Each split has a list of its
    class names. Images are lossless grey PNG files, labels `.cls`. Shards are written under temporary names, and the
    manifest last; if it exists and its shards have the right sizes, nothing is written.

    Raises:
        DataError: `to` holds other shards, or the source is damaged.
    """
    source, to = Path(source), Path(to)
    names = {
        split: [f"{split}/{shard:04d}.tar" for shard in range(count)]
        for split, count in (("train", train_shards), ("few", 1), ("test", test_shards))
    }
    wanted = [name for part in names.values() for name in part]
    if _complete(to, wanted):
        return to
    found = (path.relative_to(to).as_posix() for path in to.rglob("*.tar"))
    foreign = sorted(name for name in found if name not in wanted)
    if foreign:
        raise DataError(f"{to} holds {foreign[0]}, which isn't one of {', '.join(wanted)}; delete it or choose another")
    (to / MANIFEST).unlink(missing_ok=True)
    for split in names:
        (to / split).mkdir(parents=True, exist_ok=True)
        images, labels = load(source, "test" if split == "test" else "train")
        rows = _few(labels) if split == "few" else np.arange(len(images))
        log.info("writing %d images to %s", len(rows), to / split)
        for name, part in zip(names[split], np.array_split(rows, len(names[split])), strict=True):
            _write_shard(to / name, images, labels, part)
        _replace(to / split / CLASSES_FILE, json.dumps(CLASSES, indent=1) + "\n")
    sizes = {name: (to / name).stat().st_size for name in wanted}
    _replace(to / MANIFEST, json.dumps({"data": "Fashion-MNIST", "shards": sizes}, indent=2) + "\n")
    return to


def _few(labels: np.ndarray) -> np.ndarray:
    """Returns the rows of the first `FEW_PER_CLASS` images of each class, ascending."""
    rows = [np.flatnonzero(labels == label)[:FEW_PER_CLASS] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(rows))


def _complete(to: Path, wanted: list[str]) -> bool:
    """Returns whether the manifest exists and lists exactly the wanted shards with their sizes."""
    try:
        shards = parse_json((to / MANIFEST).read_bytes())["shards"]
        return sorted(shards) == sorted(wanted) and all((to / n).stat().st_size == size for n, size in shards.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write_shard(path: Path, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
    """Writes the images and labels of `rows` as a tar with fixed times, so that its bytes are reproducible."""
    from webdataset import TarWriter

    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file, TarWriter(file, mtime=0.0) as writer:
        for row in rows:
            png = io.BytesIO()
            Image.fromarray(images[row]).save(png, format="PNG")
            writer.write({"__key__": f"{row:06d}", "png": png.getvalue(), "cls": int(labels[row])})
    temporary.replace(path)


def _replace(path: Path, text: str) -> None:
    """Writes a small file through a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
