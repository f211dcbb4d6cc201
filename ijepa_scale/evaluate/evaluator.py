"""Defines the protocol of evaluators, which training runs call with a forward function. Must not know any engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.data import Verify
from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.sources.scan import Members
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.features import Forward
from ijepa_scale.registry import EVALUATORS


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How the encoder's images are read, sized and normalised."""

    size: tuple[int, int]  # height and width, pixels
    mean: tuple[float, ...]  # of each channel, in units of the format's white
    std: tuple[float, ...]
    exif: Exif = "ignore"
    pixels: PixelFormat = RGB8
    members: Members | None = None  # of shards
    verify: Verify = "first_open"  # what shards share with their manifest


class Evaluator(Protocol):
    """Evaluates an encoder during training."""

    Config: ClassVar[type[Any]]  # the section `evaluate` for this evaluator

    def __init__(self, config: Any, images: ImageSettings, world: World) -> None:
        """Opens and checks the data, before the training starts.

        Raises:
            DataError: images or labels can't be used.
        """

    def run(self, forward: Forward) -> dict[str, float]:
        """Returns figures by name, the same on every process. `forward` maps images to the encoder's tokens.

        Synchronises and communicates, so every process must call it.
        """


def image_settings(config: PretrainConfig) -> ImageSettings:
    """Returns how a run's images are read for evaluation."""
    data, (mean, std) = config.data, config.augment.normalisation
    return ImageSettings(
        size=config.model.image_size,
        mean=mean,
        std=std,
        exif=data.exif,
        pixels=PixelFormat(config.model.channels, data.pixels),
        members=Members(data.image_member, data.label_member),
        verify=data.verify,
    )


def build_evaluator(config: PretrainConfig, world: World) -> Evaluator:
    """Returns the evaluator that `evaluate.evaluator` names.

    Raises:
        ConfigError: the name is unknown.
        DataError: images or labels can't be used.
    """
    return EVALUATORS.get(config.evaluate.evaluator)(config.evaluate, image_settings(config), world)
