"""Finds an encoder's sizes in its tensors and facts, and fits tensors to other sizes. Knows nothing of files.

Two things can be fitted: the position embedding to another grid, and the patch embedding to other channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijepa_scale.checkpoint.sources import Weights
from ijepa_scale.config.architectures import ARCHITECTURES
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.pos_embed import positions

PATCHES = "patch_embed.proj.weight"
FIRST = "blocks.0.mlp.fc1.weight"
Grid = tuple[int, int]


class Positions(NamedTuple):
    """A fixed position embedding: its grid of patches, down and across, and the one that it was computed for."""

    grid: Grid
    computed_for: Grid


def positions_of(weights: Weights) -> Positions | None:
    """Returns what the source's position embedding is; None if it has none.

    Raises:
        CheckpointError: it isn't a fixed sine-cosine embedding.
    """
    found = weights.tensors.get("pos_embed")
    if found is None:
        return None
    flat = found.reshape(-1, found.shape[-1]).float()
    count, width = flat.shape
    tolerance = 1e-4 if found.dtype in (torch.float32, torch.float64) else 1e-2  # for half precision
    hint = _stated_grid(weights)
    grids = [(count // w, w) for w in range(1, count + 1) if count % w == 0]
    for grid in sorted(grids, key=lambda each: (each != hint, abs(each[0] - each[1]))):
        for computed_for in dict.fromkeys((weights.facts.position_grid or grid, grid)):
            if width % 4 == 0 and torch.allclose(flat, positions(width, grid, computed_for), rtol=0, atol=tolerance):
                return Positions(grid, computed_for)
    raise CheckpointError(
        f"{weights.origin}: pos_embed of {count} patches isn't a fixed sine-cosine embedding of any grid, and this "
        "package doesn't support trained ones: the file belongs to another model"
    )


def sizes_of_weights(weights: Weights) -> dict[str, Any]:
    """Returns the encoder's sizes as `EncoderConfig` names them, `channels` with them.

    `image_size` and `heads` are missing where the source doesn't show them: heads are known by the facts, or by the
    width and depth of a named architecture.

    Raises:
        CheckpointError: the patches aren't square, there are no blocks, or the position embedding isn't fixed.
    """
    tensors = weights.tensors
    for name, dims in ((PATCHES, 4), (FIRST, 2)):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape is None or len(shape) != dims or 0 in shape or (name == PATCHES and shape[2] != shape[3]):
            found = f"no {name}" if shape is None else f"{name} of shape {shape}"
            raise CheckpointError(
                f"{weights.origin} has {found}; this package's encoder has square patches and plain MLPs"
            )
    width, channels, patch, _ = tensors[PATCHES].shape
    first, depth = tensors[FIRST], depth_of(tensors)
    if depth > len(tensors):
        raise CheckpointError(f"{weights.origin} has block {depth - 1} but only {len(tensors)} tensors; don't trust it")
    found_positions = positions_of(weights)
    grid = found_positions.grid if found_positions else _stated_grid(weights)
    named = next(
        (n for n, s in ARCHITECTURES.items() if (s.width, s.depth, s.mlp_width) == (width, depth, len(first))), None
    )
    heads = weights.facts.heads or (ARCHITECTURES[named].heads if named else None)
    sizes: dict[str, Any] = {"name": named or "vit_base", "patch_size": patch, "channels": channels}
    if grid is not None:
        sizes["image_size"] = (grid[0] * patch, grid[1] * patch)
    if heads is not None:
        sizes["heads"] = heads
    if named is None:
        sizes |= {"width": width, "depth": depth, "mlp_ratio": mlp_ratio(width, len(first))}
    return sizes


def mlp_ratio(width: int, mlp_width: int) -> float:
    """Returns the ratio by which a width gives that of an MLP, of which models take the whole part."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)


def depth_of(tensors: Mapping[str, Tensor], prefix: str = "blocks") -> int:
    """Returns the number of blocks."""
    found = (re.match(rf"{prefix}\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(block[1]) for block in found if block), default=-1)


def with_channels(patches: Tensor, channels: int) -> Tensor:
    """Returns patch weights (D, C, P, P) for images of `channels` channels: each gets the sum over C / `channels`.

    So an image whose channels are all the same gives the same tokens as before. Nothing says which of the new channels
    is most like red, so none is preferred. Returns `patches` itself if it has that many.
    """
    if patches.shape[1] == channels:
        return patches
    mean = patches.float().sum(dim=1, keepdim=True) / channels
    return mean.expand(-1, channels, -1, -1).to(patches.dtype)


def _stated_grid(weights: Weights) -> Grid | None:
    size = weights.facts.image_size
    patch = weights.tensors[PATCHES].shape[-1] if PATCHES in weights.tensors else 0
    return (size[0] // patch, size[1] // patch) if size and patch else None
