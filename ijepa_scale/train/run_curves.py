"""Draws a run's curves into its folder when it ends. Must not know any kind of training."""

from __future__ import annotations

import logging
from pathlib import Path

from ijepa_scale.errors import DataError
from ijepa_scale.visualize.curves import draw_runs, read_runs

logger = logging.getLogger(__name__)

CURVES = "curves.png"


def draw_curves(folder: Path) -> None:
    """Draws the usual fields of the rows in a run's folder, those before a resumption too. Warns if there are none."""
    try:
        draw_runs(read_runs([str(folder)]), folder / CURVES)
    except DataError as error:  # the rows were removed, or no step of them counted
        logger.warning("%s can't be drawn: %s", folder / CURVES, error)
