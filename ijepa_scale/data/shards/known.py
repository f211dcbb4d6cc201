"""Reads data sets that torchvision knows by name, to be made into shards. Downloads them only when told to.

Covers only sets whose files are arrays of pixels; their images are stored as PNG, without loss. Sets whose files are
images already (Food101, Flowers102, ImageNet, ...) are read as class folders or CSV lists, byte for byte.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ijepa_scale.data.sources.scan import Problems
from ijepa_scale.errors import DataError
from ijepa_scale.plurals import counted

# name -> splits, the default first; the constructors in _BY_TRAIN take train=bool, the others split=str
_BOTH = ("train", "test")
_BY_TRAIN = ("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100")
DATASETS = {
    **dict.fromkeys(_BY_TRAIN, _BOTH),
    "STL10": (*_BOTH, "unlabeled", "train+unlabeled"),
    "SVHN": (*_BOTH, "extra"),
}


class TorchvisionImages:
    """The images of a torchvision data set as PNG, in its order; its files are in `root` or downloaded there."""

    def __init__(self, name: str, root: str | Path, *, split: str | None = None, download: bool = False) -> None:
        if name not in DATASETS:
            raise DataError(f"data set {name!r} is unknown; choose one of {', '.join(DATASETS)}")
        split = DATASETS[name][0] if split is None else split
        if split not in DATASETS[name]:
            raise DataError(f"{name} has no split {split!r}; choose {', '.join(DATASETS[name])}")
        self._dataset = _load(name, root, split=split, download=download)
        self._title = f"{name}, {split}"
        self.num_samples = len(self._dataset)
        self.shard_sizes = np.array([self.num_samples], dtype=np.int64)
        classes = getattr(self._dataset, "classes", None)
        self.classes = [str(one) for one in classes] if classes is not None else None
        self.fingerprint = f"torchvision-{name}-{split}-{self.num_samples}"
        self.origin = f"{self._title}, in {os.path.abspath(root)}"

    def read(self, sample_id: int) -> bytes:
        """Returns the image as PNG."""
        return encode_png(self._dataset[sample_id][0])

    def label(self, sample_id: int) -> int:
        """Returns the label; -1 if there is none."""
        return int(self._dataset[sample_id][1])

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64; -1 if there is none."""
        return np.array([self.label(sample) for sample in range(self.num_samples)], dtype=np.int64)

    def name(self, sample_id: int) -> str:
        """Returns the data set's name and the sample's number."""
        return f"{self._title}: {sample_id}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: the set is in memory."""

    def summary(self) -> str:
        """Returns the number of images and the data set's name, for the log."""
        return f"{counted(self.num_samples, 'image')} of {self._title}"

    def problems(self) -> Problems:
        """Returns no problems."""
        return Problems()


def encode_png(image: Image.Image, exif: bytes = b"") -> bytes:
    """Returns an image as PNG, with this block of EXIF if there is one."""
    stream = io.BytesIO()
    image.save(stream, "PNG", **({"exif": exif} if exif else {}))
    return stream.getvalue()


def _load(name: str, root: str | Path, *, split: str, download: bool) -> Any:
    """Returns the torchvision data set."""
    from torchvision import datasets  # takes 2 s to import

    arguments: dict[str, Any] = {"train": split == "train"} if name in _BY_TRAIN else {"split": split}
    try:
        return getattr(datasets, name)(str(root), download=download, **arguments)
    except ImportError as error:
        raise DataError(f"{name} needs a package that isn't installed ({error}); install it with pip") from None
    except (OSError, RuntimeError, ValueError, LookupError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "check the connection and the disk" if download else f"put its files into {root}, or add --download"
        raise DataError(f"{name} can't be read from {root} ({reason}); {remedy}") from None


__all__ = ["DATASETS", "TorchvisionImages", "encode_png"]
