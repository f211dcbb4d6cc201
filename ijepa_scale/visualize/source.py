"""What a picture is made from: an encoder with its images, or a whole I-JEPA with its masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.checkpoint.geometry import positions_of, sizes_of_weights
from ijepa_scale.checkpoint.sources import RunSource, WeightsSource, open_source
from ijepa_scale.checkpoint.start import predictor_sizes, start_from
from ijepa_scale.checkpoint.store import Checkpoint, newest
from ijepa_scale.config import MaskConfig, ModelConfig
from ijepa_scale.data.sources.fetch import scheme_of
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.evaluate.frozen import ImageTransform, load
from ijepa_scale.masks import MaskSampler
from ijepa_scale.models.jepa import JEPA
from ijepa_scale.models.registry import build_jepa, build_target
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.visualize.photographs import Photographs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Where weights and images come from.

    Attributes:
        source: anything that `ijepa_scale.load` reads.
        images: files, folders, a list of paths or shards; none: those that the source was evaluated or trained on.
        which: target or context encoder.
        image_size: side of the encoder's input, pixels; None: as trained.
    """

    source: str
    images: Sequence[str] = ()
    reader: str | None = None
    which: str = "target"
    image_size: int | None = None
    heads: int | None = None
    _loaded: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)  # for all pictures

    def encoder(self, times: int = 1) -> tuple[VisionTransformer, ImageTransform]:
        """Returns the encoder, on a GPU if there is one, and its transform.

        Without a given image size, it takes images of `times` the size that it was trained on, with interpolated
        positions.
        """
        encoder, transform = self._load(self.image_size)
        if self.image_size is None and times > 1:
            height, width = (times * side for side in transform.image_size)
            encoder, transform = self._load((height, width))
        return encoder.to(_device()), transform

    def _load(self, size: int | tuple[int, int] | None) -> tuple[VisionTransformer, ImageTransform]:
        if size not in self._loaded:
            self._loaded[size] = load(self.source, which=self.which, image_size=size, heads=self.heads)
        return self._loaded[size]

    def photographs(self, transform: ImageTransform) -> Photographs:
        """Returns the images.

        Raises:
            UserError: there are none, or they can't be listed.
        """
        given, reader = (list(self.images), self.reader) if self.images else self._own_images()
        return Photographs.of(given, reader, transform)

    def _own_images(self) -> tuple[list[str], str | None]:
        """Returns the images that a run was evaluated on, else those that it was trained on, and their reader."""
        config = self.config()
        evaluated, trained = config.get("evaluate", {}), config.get("data", {})
        for section, key in ((evaluated, "test"), (evaluated, "data"), (trained, "train")):
            path = section.get(key)
            if isinstance(path, str) and scheme_of(path) is None and Path(path).exists():
                logger.info("images: %s, from the configuration of %s; --images names others", path, self.source)
                return [path], section.get("reader")
        raise ConfigError(f"{self.source} names no images that are here; give --images FOLDER or SHARDS")

    def config(self) -> dict[str, Any]:
        """Returns the configuration that a checkpoint of this package stores; an empty one for other sources."""
        path = Path(self.source)
        checkpoint = newest(path / "checkpoints") or newest(path) or path
        return Checkpoint(checkpoint).extra.get("config", {}) if (checkpoint / "manifest.json").is_file() else {}

    @property
    def has_masks(self) -> bool:
        """Whether the source tells how its masks were drawn."""
        return self.config().get("masks") is not None

    def masks(self, grid: tuple[int, int]) -> MaskSampler:
        """Returns the sampler that the source was trained with; of other sources than runs, the default one."""
        config = self.config()
        stored = config.get("masks")
        if stored is None:
            logger.info("%s doesn't state how its masks were drawn; using the default sampler", self.source)
        settings = MaskConfig.chosen(stored or {})(**stored or {})
        assert isinstance(settings, MaskConfig)
        return MaskSampler(settings, grid, seed=config.get("seed", 0))

    def jepa(self) -> tuple[JEPA, VisionTransformer, ImageTransform]:
        """Returns encoder and predictor, the target encoder, and the transform; at the trained image size.

        Raises:
            CheckpointError: the source has no predictor, or lacks something else.
        """
        opened = open_source(self.source)
        tensors = opened.predictor()
        if tensors is None:
            raise CheckpointError(
                f"{self.source} has no predictor; give a run of pretraining, its checkpoint or a published .pth.tar"
            )
        model = ModelConfig(**(self._sizes(opened) | predictor_sizes(tensors)))
        jepa = build_jepa(model, seed=0)
        target = build_target(jepa)
        logger.info("%s", start_from(opened, jepa, target).text())
        _, transform = self._load(None)
        return jepa.eval().requires_grad_(False).to(_device()), target.to(_device()), transform

    def _sizes(self, opened: WeightsSource) -> dict[str, Any]:
        if isinstance(opened, RunSource):
            return opened.model_config().values() | {"init": None}
        weights = opened.encoder("target")
        sizes, positions = sizes_of_weights(weights), positions_of(weights)
        sizes |= {"heads": self.heads} if self.heads else {}
        lacking = [name for name in ("image_size", "heads") if name not in sizes]
        if lacking:
            raise ConfigError(
                f"{self.source} doesn't state the {lacking[0]} of its encoder; give --{lacking[0].replace('_', '-')}"
            )
        if positions is not None and positions.computed_for != positions.grid:
            sizes["position_grid"] = positions.computed_for
        return sizes


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
