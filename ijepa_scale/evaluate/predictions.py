"""Predicts the classes of single images with a finetuned run, in one process on any device."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ijepa_scale.augment.eval_transform import EvalTransform
from ijepa_scale.checkpoint.store import Checkpoint, newest
from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.earlier import stored
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.deep_decode import decode_as
from ijepa_scale.data.sources.listing import images_below
from ijepa_scale.data.sources.read_file import read_image_file
from ijepa_scale.errors import CheckpointError, ConfigError, DataError, SampleError
from ijepa_scale.models.classifier import Classifier, build_classifier
from ijepa_scale.plurals import counted


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    probability: float


class ImageClassifier:
    """A finetuned classifier from a checkpoint, or from the best (else newest) checkpoint of a run folder.

    Raises:
        CheckpointError: there is none, or it isn't a classifier's.
        ConfigError: `device` doesn't exist.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        path = Path(path)
        self.checkpoint = newest(path / "best") or newest(path / "checkpoints") or path
        checkpoint = Checkpoint(self.checkpoint)
        if checkpoint.extra.get("kind", "pretrain") != "finetune":
            raise CheckpointError(
                f"{self.checkpoint} is from a pretraining run, which has no classes; finetune it first: "
                "launch/finetune.py --config C.yaml model.init=RUN"
            )
        used = ("model", "augment", "evaluate")
        found = stored(checkpoint.extra["config"], FinetuneConfig, sections=used)
        pixels = found.get("data", {}).get("pixels", RGB8.dtype)  # the reader that data names need not be there
        config = FinetuneConfig(**{name: found[name] for name in used}, data=DataConfig(batch_size=1, pixels=pixels))
        self._config = config.model
        self.classes = checkpoint.extra["classes"] or [str(number) for number in range(self._config.num_classes)]
        self._device = _usable(device)
        size, (mean, std) = config.model.encoder.image_size, config.augment.normalisation
        self._pixels = PixelFormat(config.model.encoder.channels, config.data.pixels)
        self._transform = EvalTransform(
            size, config.evaluate.crop_of(size), mean=mean, std=std, pixels=self._pixels, device=self._device
        )
        prefix = "target." if "target.head.weight" in checkpoint.tensors else "model."  # averaged weights, if any
        self.module: Classifier = build_classifier(self._config)
        missing, unexpected = self.module.load_state_dict(checkpoint.full(prefix), strict=False)
        if missing != ["encoder.pos_embed"] or unexpected:  # pos_embed is computed from the grid, not stored
            raise CheckpointError(
                f"{self.checkpoint}: missing {missing}, unexpected {unexpected}; use a matching version"
            )
        self.module.eval().to(self._device)

    def load(self, path: str | Path) -> Tensor:
        """Returns an image, (C, h, w) float32, resized, centre-cropped and normalised as in evaluation.

        Unlike training by default, turns it as its EXIF orientation says, since a photograph is given as it is seen.

        Raises:
            DataError: it can't be read or decoded.
        """
        try:
            pixels = decode_as(self._pixels, read_image_file(path), exif="apply")
        except SampleError as error:
            raise DataError(f"image {path}: {error}") from None
        return self._transform([pixels])[0]

    @torch.no_grad()
    def __call__(self, images: Tensor, *, top: int = 5) -> list[list[Guess]]:
        """Returns the `top` likeliest classes of each image (B, C, h, w), the likeliest first. Synchronises."""
        shares, order = self.module(images.to(self._device)).softmax(dim=-1).topk(min(top, len(self.classes)))
        return [
            [Guess(self.classes[number], share) for share, number in zip(row, numbers, strict=True)]
            for row, numbers in zip(shares.tolist(), order.tolist(), strict=True)
        ]


class ImageFiles:
    """The image files that paths name: files as they are, and all images below folders.

    `problems` holds a line for each folder that can't be listed, `passed_over` one for each in which files aren't read.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.files: list[str] = []
        self.problems: list[str] = []
        self.passed_over: list[str] = []
        for path in paths:
            if not os.path.isdir(path):
                self.files.append(path)
                continue
            try:
                below, found = images_below(path)
            except DataError as error:
                self.problems.append(str(error))
                continue
            self.files += below
            if found.passed_over():
                self.passed_over.append(f"not read in {path}: {found.passed_over()}")


def _usable(device: torch.device | str) -> torch.device:
    """Returns the device after checking that it exists."""
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; give cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count()
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and (chosen.index or 0) >= count):
        raise ConfigError(
            f"device {chosen} can't be used: this host has {counted(count, 'GPU')}; give cpu, or cuda:N below that"
        )
    return chosen
