"""Crops reach every edge of an image: the first and the last row and column, at full size and reduced."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ijepa_scale import rng
from ijepa_scale.data.decode import CROP_DRAWS, choose_box, decode_crop

SCALE, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
DRAWS = rng.uniform(0, "test", 0, np.arange(3000), CROP_DRAWS).tolist()


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (61, 47)])
def test_boxes_touch_every_edge_and_lie_evenly(shape: tuple[int, int]) -> None:
    height, width = shape
    boxes = [choose_box(height, width, draws, SCALE, RATIO) for draws in DRAWS]
    rows = [(top, height - h) for top, _, h, _ in boxes if h < height]
    columns = [(left, width - w) for _, left, _, w in boxes if w < width]
    for places in (rows, columns):
        assert len(places) > 1000
        assert min(place for place, _ in places) == 0
        assert all(0 <= place <= last for place, last in places)
        at_first, at_last = (sum(place == edge for place, edge in pairs) for pairs in (
            [(place, 0) for place, _ in places], places))  # fmt: skip
        expected = sum(1 / (last + 1) for _, last in places)  # each place is as likely as any other
        assert abs(at_first - expected) < 4 * expected**0.5 and abs(at_last - expected) < 4 * expected**0.5


def test_rows_and_columns_are_drawn_apart() -> None:
    boxes = [choose_box(400, 400, draws, SCALE, RATIO) for draws in DRAWS]
    places = np.array([(top / (400 - h), left / (400 - w)) for top, left, h, w in boxes if max(h, w) < 380])
    assert len(places) > 1000 and abs(np.corrcoef(places.T)[0, 1]) < 0.1


@pytest.mark.parametrize("kind", ["pixels", "PNG"])
@pytest.mark.parametrize("output", [(64, 64), (8, 8)], ids=["full size", "reduced"])
def test_what_is_cut_out_reaches_the_last_row_and_column(kind: str, output: tuple[int, int]) -> None:
    """Each pixel says where it is; a pixel of a resized crop is the mean of those around it."""
    height, width = 61, 55
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(height)[:, None], np.arange(width)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    data = pixels if kind == "pixels" else stream.getvalue()
    crops = [decode_crop(data, draws, output, scale=(0.3, 0.8), ratio=RATIO) for draws in DRAWS[:600]]
    slack = 0 if output == (64, 64) else 1 if kind == "pixels" else 4
    assert min(int(crop[0, 0, 0]) for crop in crops) <= slack and min(int(crop[0, 0, 1]) for crop in crops) <= slack
    assert max(int(crop[-1, 0, 0]) for crop in crops) >= height - 1 - slack
    assert max(int(crop[0, -1, 1]) for crop in crops) >= width - 1 - slack
