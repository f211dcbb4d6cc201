"""The fixed position embedding, and its resampling to another grid. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BASE = 10000.0


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Returns the 2-D sine-cosine embedding (rows * columns, width), fp32, row-major.

    The patch in column x and row y is [sin(x w), cos(x w), sin(y w), cos(y w)], the column first, with
    w_k = 10000^(-k / (width / 4)). Computed in fp64 on the CPU, so no default device or dtype changes it.

    Raises:
        ValueError: the width is not divisible by 4, or the grid is empty.

    Source: "Attention is all you need", arXiv 1706.03762, section 3.5, for each axis; the order is that of the
    released I-JEPA checkpoints.
    """
    rows, columns = grid
    if width < 4 or width % 4:
        raise ValueError(f"width {width} can't hold sine and cosine of two axes; give a multiple of 4")
    if rows < 1 or columns < 1:
        raise ValueError(f"grid {grid} has no patches; give at least one row and one column")
    quarter = width // 4
    frequencies = _BASE ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    y, x = (torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequencies for count in grid)
    parts = [
        part[None, :, :].expand(rows, columns, quarter) for part in (x.sin(), x.cos())
    ] + [
        part[:, None, :].expand(rows, columns, quarter) for part in (y.sin(), y.cos())
    ]  # fmt: skip
    return torch.cat(parts, dim=-1).reshape(rows * columns, width).float()


def positions(width: int, grid: tuple[int, int], computed_for: tuple[int, int] | None = None) -> Tensor:
    """Returns the embedding (rows * columns, width), fp32, of `grid`.

    It is `sincos_2d` of that grid or, with another grid `computed_for`, that grid's embedding interpolated to it.

    Raises:
        ValueError: see `sincos_2d`.
    """
    if computed_for is None:
        return sincos_2d(width, grid)
    return resample(sincos_2d(width, computed_for), computed_for, grid)


def resample(pos: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]) -> Tensor:
    """Returns the embedding (..., N, D) of `from_grid` interpolated to `to_grid`, in its own dtype.

    Bicubic with antialiasing, computed in fp32. A position keeps its meaning from training, as a fraction of the
    image. (`sincos_2d` of the new grid counts patches instead; use that to train from scratch.) Returns `pos` itself
    if the grids are equal.

    Raises:
        ValueError: `pos` doesn't hold the patches of `from_grid`.
    """
    rows, columns = from_grid
    if pos.shape[-2] != rows * columns:
        raise ValueError(
            f"the position embedding has {pos.shape[-2]} tokens but grid {rows} x {columns} has {rows * columns}; "
            "pass the grid that it was trained on"
        )
    if tuple(from_grid) == tuple(to_grid):
        return pos
    width = pos.shape[-1]
    planes = pos.float().reshape(-1, rows, columns, width).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=tuple(to_grid), mode="bicubic", antialias=True, align_corners=False)
    return planes.permute(0, 2, 3, 1).reshape(*pos.shape[:-2], to_grid[0] * to_grid[1], width).to(pos.dtype)
