"""Labelled images to evaluate on: a training and a test set of the same classes. Knows no encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ijepa_scale.config.form import Exif
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.data.sources.open import build_source, reader_of
from ijepa_scale.data.sources.source import SampleSource, check_whole
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.class_lists import compare_classes
from ijepa_scale.evaluate.stored_features import ImagesToEncode


class Named(NamedTuple):
    """Where the images of a set are."""

    name: str  # "" for the set of --data
    train: str
    test: str


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images of which all have labels."""

    path: str
    reader: str
    images: ImagesToEncode
    labels: np.ndarray  # (N,) int64

    @property
    def source(self) -> SampleSource:
        """The images."""
        return self.images.source


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """A training and a test set."""

    name: str
    train: LabelledImages
    test: LabelledImages

    @classmethod
    def open(cls, given: Named, reader: str | None, exif: Exif, *, log: bool) -> LabelledSet:
        """Returns the sets under two paths, which `reader` reads; None: by what the training path is.

        Raises:
            DataError: they can't be read, images have no labels, or the classes differ.
        """
        prefix = f"{given.name}: " if given.name else ""
        found = []
        for part, path in (("train", given.train), ("test", given.test)):
            if scheme_of(path) is not None:
                raise DataError(f"{prefix}{part} images: {path} is remote; copy it to a local folder first")
            kind = reader or reader_of(given.train)
            source = build_source(kind, path)
            check_whole(source)
            name = f"{given.name}-{part}" if given.name else part
            found.append((kind, ImagesToEncode(name=name, source=source, exif=exif), path))
        names = [f"{prefix}the {part} images" for part in ("train", "test")]
        compare_classes((names[0], found[0][1].source), (names[1], found[1][1].source), log=log)
        train, test = (
            LabelledImages(path=path, reader=kind, images=images, labels=_labels(images.name, images.source))
            for kind, images, path in found
        )
        return cls(name=given.name, train=train, test=test)

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the highest label."""
        return 1 + int(max(self.train.labels.max(), self.test.labels.max()))


def _labels(name: str, source: SampleSource) -> np.ndarray:
    labels = source.labels()
    unlabelled = np.flatnonzero(labels < 0)
    if len(unlabelled):
        raise DataError(
            f"{len(unlabelled)} of {len(labels)} {name} images have no label (the first is "
            f"{source.name(int(unlabelled[0]))}); give class folders, or shards or a list with labels"
        )
    return labels
