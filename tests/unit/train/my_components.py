"""One component of each kind from outside the package: what a user's `--plugin` module may hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.schema import EvaluateConfig, MaskConfig, ObjectiveConfig, OptimizerConfig, SinkConfig
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.masks.draw import Lengths
from ijepa_scale.masks.group import GroupMasks
from ijepa_scale.objectives.targets import mean_over_images, normalise_targets, select_targets
from ijepa_scale.optim.kind import OptimizerKind
from ijepa_scale.registry import EVALUATORS, OBJECTIVES, OPTIMIZERS, SAMPLERS, SINKS, SOURCES


class LogCoshConfig(ObjectiveConfig):
    """Logarithm of the hyperbolic cosine."""

    scale: float = Field(1.0, gt=0, description="Distance at which the loss turns from quadratic to linear.")


@OBJECTIVES.register("log_cosh")
class LogCosh:
    """A loss of one's own."""

    Config = LogCoshConfig

    def __init__(self, config, *, fused=False):
        self.scale = config.scale

    def __call__(self, prediction, tokens, masks, wanted):
        target = select_targets(normalise_targets(tokens), wanted.rows, masks)
        return mean_over_images(((prediction.float() - target) / self.scale).cosh().log().mean(dim=-1), masks)


class StripeConfig(MaskConfig):
    """Rows of the grid."""

    target_rows: int = Field(1, ge=1, description="Rows of patches in each target.")


@SAMPLERS.register("stripes")
class Stripes:
    """Each target is some rows of the grid; the context is the other rows."""

    Config = StripeConfig

    def __init__(self, config, grid, *, seed):
        self.config, self.grid, self.seed = config, grid, seed

    def longest(self):
        height, width = self.grid
        return Lengths(context=(height - self.config.target_rows) * width, target=self.config.target_rows * width)

    def group(self, step, group, count):
        height, width = self.grid
        rows = self.config.target_rows
        top = (step + group) % (height - rows + 1)
        target = np.arange(top * width, (top + rows) * width)
        context = np.ones((self.config.num_context_blocks, count, height * width), dtype=bool)
        context[:, :, target] = False
        return GroupMasks(context, np.tile(target, (self.config.num_target_blocks, count, 1)))


class SgdConfig(OptimizerConfig):
    """Plain gradient descent."""

    nesterov_momentum: float = Field(0.5, ge=0, lt=1, description="Momentum.")
    state_names = ("momentum_buffer",)


@OPTIMIZERS.register("sgd")
class Sgd(OptimizerKind):
    """PyTorch's SGD."""

    Config = SgdConfig

    @staticmethod
    def build(groups, config, *, offload):
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.nesterov_momentum, nesterov=True)


class NormConfig(EvaluateConfig):
    """The length of features."""

    images: int = Field(4, ge=1, description="Noise images that are encoded.")


@EVALUATORS.register("feature_norm")
class FeatureNorm:
    """Mean length of the tokens of noise images."""

    Config = NormConfig

    def __init__(self, config, images, world):
        self.pixels = torch.zeros(config.images, 3, *images.size, device=world.device)

    def run(self, forward):
        return {"feature_norm": float(forward(self.pixels).float().norm(dim=-1).mean())}


class LinesConfig(SinkConfig):
    """A file of one's own."""

    file: str = Field("rows.txt", description="Name of the file in the run's folder.")


@SINKS.register("lines")
class Lines:
    """Appends rows to a text file."""

    Config = LinesConfig

    def __init__(self, config, folder: Path, *, drop_from, run):
        self.path, self.seed = folder / config.file, run["seed"]

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps({"seed": self.seed, **row}) + "\n")

    def close(self):
        pass


class NoiseConfig(DataConfig):
    """Noise."""

    noise_images: int = Field(16, ge=1, description="Size of the set.")


@SOURCES.register("noise")
class Noise(SyntheticSource):
    """Images that the plugin makes."""

    Config = NoiseConfig

    def __init__(self, data, image_size):
        super().__init__(data.noise_images, image_size, seed=7)
