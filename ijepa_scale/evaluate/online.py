"""Evaluates the target encoder during training: nearest neighbours and a linear layer. Must not know any engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.config.schema import KnnConfig
from ijepa_scale.data.eval_reader import EvalReader, spread
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.data.sources.source import SampleSource, check_whole, described
from ijepa_scale.engine.agreement import check_alike
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.class_lists import compare_classes
from ijepa_scale.evaluate.evaluator import ImageSettings
from ijepa_scale.evaluate.features import (
    Forward,
    check_images,
    extract_features,
    gather_features,
    local_ids,
    until_asked,
)
from ijepa_scale.evaluate.knn import knn_accuracy
from ijepa_scale.evaluate.least_squares import linear_accuracy


class OnlineKnn:
    """Measures how well `evaluate.train` classifies `evaluate.test`: by nearest neighbours, and by a linear layer.

    Opens sources, checks labels and tries all images at construction, before the training starts. Each process tries
    and encodes its part of the images. The accuracy is the same on all processes, and for any number of them.
    """

    Config = KnnConfig

    def __init__(self, config: KnnConfig, images: ImageSettings, world: World) -> None:
        self._config, self._images, self._world = config, images, world
        train, test = (
            build_source(config.reader, pattern, members=images.members, verify=images.verify)
            for pattern in (config.train, config.test)
        )
        for source in (train, test):
            check_whole(source)
        compare_classes(("evaluate.train", train), ("evaluate.test", test), log=world.is_main)
        self._train = _Split("evaluate.train", train, config.max_train)
        self._test = _Split("evaluate.test", test, config.max_test)
        check_alike(world, {f"what is in {each.name}": described(each.source) for each in (self._train, self._test)})
        for split in (self._train, self._test):
            check_images(split.source, split.ids, split.name, world=world, exif=images.exif, pixels=images.pixels)
        self._num_classes = int(max(self._train.labels.max(), self._test.labels.max())) + 1

    def run(self, forward: Forward) -> dict[str, float]:
        """Returns the accuracies `knn` and `linear`, 0 to 1, of `forward` (images -> patch tokens) on the test images.

        Synchronises and communicates, so every process must call it.
        """
        labelled = [
            part
            for split in (self._train, self._test)
            for part in (self._features(forward, split), split.labels.to(self._world.device))
        ]
        config, classes = self._config, self._num_classes
        knn = knn_accuracy(*labelled, neighbors=config.neighbors, temperature=config.temperature, num_classes=classes)
        return {"knn": knn, "linear": linear_accuracy(*labelled, num_classes=classes)}

    def _features(self, forward: Forward, split: _Split) -> Tensor:
        """Returns the features of all images of a split, in order."""
        reader = EvalReader(
            split.source,
            self._images.size,
            ids=local_ids(split.ids, self._world.rank, self._world.size),
            batch_size=self._config.batch_size,
            mean=self._images.mean,
            std=self._images.std,
            exif=self._images.exif,
            pixels=self._images.pixels,
            pin_memory=self._world.device.type == "cuda",
        )
        features = extract_features(forward, until_asked(reader, self._world), self._world.device)
        return gather_features(features, self._world.gather, len(split.ids))


class _Split:
    """Images chosen evenly from a labelled data set, and their labels."""

    def __init__(self, name: str, source: SampleSource, most: int) -> None:
        self.name, self.source = name, source
        self.ids: np.ndarray = spread(source.num_samples, most)
        self.labels = torch.from_numpy(source.labels()[self.ids])
        unlabelled = int((self.labels < 0).sum())
        if unlabelled:
            first = self.source.name(int(self.ids[int((self.labels < 0).nonzero()[0])]))
            raise DataError(
                f"{name}: {unlabelled} of {len(self.ids)} images have no label (the first is {first}); "
                "give labelled images, or set evaluate.every=0"
            )
