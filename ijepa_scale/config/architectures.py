"""The named architectures and their sizes, written once. Numbers only, builds no module.

Models are built from an `Architecture`, and parameters, FLOPs and memory are counted from it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.errors import ConfigError

PREDICTOR_MLP_RATIO = 4.0  # of every published predictor, ViT-g's too


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that a name stands for."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    predictor_depth: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Every size of one encoder and its predictor; widths are in channels, `grid` in patches down and across."""

    name: str
    grid: tuple[int, int]
    position_grid: tuple[int, int] | None  # the grid that positions are interpolated from; None: computed for `grid`
    patch_size: int  # pixels
    channels: int  # of an image
    width: int
    depth: int
    heads: int  # of the encoder and the predictor
    mlp_width: int
    predictor_width: int
    predictor_depth: int
    predictor_mlp_width: int

    @property
    def num_patches(self) -> int:
        """Tokens of a whole image."""
        return self.grid[0] * self.grid[1]


# Source: the I-JEPA paper (arXiv 2301.08243), appendix A, and the names of its released configurations.
ARCHITECTURES: dict[str, Sizes] = {
    "vit_tiny": Sizes(width=192, depth=12, heads=3, mlp_width=768, predictor_depth=6),
    "vit_small": Sizes(width=384, depth=12, heads=6, mlp_width=1536, predictor_depth=6),
    "vit_base": Sizes(width=768, depth=12, heads=12, mlp_width=3072, predictor_depth=6),
    "vit_large": Sizes(width=1024, depth=24, heads=16, mlp_width=4096, predictor_depth=12),
    "vit_huge": Sizes(width=1280, depth=32, heads=16, mlp_width=5120, predictor_depth=12),
    "vit_giant": Sizes(width=1408, depth=40, heads=16, mlp_width=6144, predictor_depth=16),  # ratio 48 / 11
}


def sizes_of(name: str) -> Sizes:
    """Returns the sizes that `name` stands for.

    Raises:
        ConfigError: The name isn't known; the message holds the nearest one.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"model.name is {name!r}, which isn't known; {hint}choose one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def resolve(model: ModelConfig) -> Architecture:
    """Returns the sizes of the model that `model` describes: the named ones with its overrides applied.

    Raises:
        ConfigError: Unknown name, or widths that don't divide by the heads or by 4 (the position
            embedding has a sine and a cosine for each of two axes); all problems in one message.
    """
    named = sizes_of(model.name)
    width = named.width if model.width is None else model.width
    depth = named.depth if model.depth is None else model.depth
    heads = named.heads if model.heads is None else model.heads
    predictor_depth = named.predictor_depth if model.predictor_depth is None else model.predictor_depth
    if model.mlp_ratio is not None:
        mlp_width = int(width * model.mlp_ratio)
    else:
        mlp_width = width * named.mlp_width // named.width  # in integers: 1408 * (48 / 11) is exact this way
    problems = [
        *_divisibility("width", width, heads),
        *_divisibility("predictor_width", model.predictor_width, heads),
    ]
    if mlp_width < 1:
        problems.append(
            f"model.mlp_ratio is {model.mlp_ratio}: no MLP width is left of {width}; give 4.0, for instance"
        )
    if problems:
        raise ConfigError(*problems)
    return Architecture(
        name=model.name,
        grid=model.grid,
        position_grid=model.position_grid,
        patch_size=model.patch_size,
        channels=model.channels,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=mlp_width,
        predictor_width=model.predictor_width,
        predictor_depth=predictor_depth,
        predictor_mlp_width=int(model.predictor_width * PREDICTOR_MLP_RATIO),
    )


def _divisibility(field: str, width: int, heads: int) -> Iterable[str]:
    """Yields a line if `width` can't be cut into `heads` or into the 4 parts of the position embedding."""
    unit = math.lcm(heads, 4)
    if width % unit:
        near = max(1, round(width / unit)) * unit
        yield f"model.{field} {width} isn't a multiple of {heads} heads and of 4; try {near}"
