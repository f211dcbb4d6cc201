"""Tile sizes for Triton programs that hold whole rows in registers."""

from __future__ import annotations

MAX_WIDTH = 32768
_TILE = 2048  # values per program when rows are short


def check_width(width: int) -> None:
    """Checks that a row fits into a program's registers.

    Raises:
        ValueError: the row is too wide.
    """
    if width > MAX_WIDTH:
        raise ValueError(
            f"width {width} is more than a program's registers hold, {MAX_WIDTH}; choose implementation='reference'"
        )


def tile(width: int) -> dict[str, int]:
    """Returns the rows and columns of a program's tile (powers of two) and its warps: 16 to 64 values per thread."""
    block = 1 << (width - 1).bit_length()
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    return {"ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": warps}
