import math

import pytest
import torch

from ijepa_scale.models.pos_embed import resample, sincos_2d


@pytest.mark.parametrize(("width", "grid"), [(8, (3, 3)), (12, (2, 5)), (1280, (16, 16)), (4, (1, 1))])
def test_every_number_follows_the_formula(width, grid):
    rows, columns = grid
    got = sincos_2d(width, grid)
    assert got.shape == (rows * columns, width) and got.dtype == torch.float32
    frequencies = [10000 ** (-k / (width / 4)) for k in range(width // 4)]
    for row in {0, rows // 2, rows - 1}:
        for column in {0, columns // 2, columns - 1}:
            expected = [f(column * w) for f in (math.sin, math.cos) for w in frequencies]
            expected += [f(row * w) for f in (math.sin, math.cos) for w in frequencies]
            assert torch.equal(got[row * columns + column], torch.tensor(expected, dtype=torch.float64).float())


def test_known_numbers_of_column_2_row_1():
    got = sincos_2d(8, (2, 3))[1 * 3 + 2]
    # sin 2, sin .02, cos 2, cos .02, sin 1, sin .01, cos 1, cos .01
    expected = [0.9092974, 0.0199987, -0.4161468, 0.9998000, 0.8414710, 0.0099998, 0.5403023, 0.9999500]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-7, rtol=0)


def test_default_dtype_and_device_do_not_change_it():
    expected = sincos_2d(16, (3, 4))
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            got = sincos_2d(16, (3, 4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_widths_and_grids_that_can_not_be_are_refused():
    with pytest.raises(ValueError, match="width 10 can't hold sine and cosine of two axes; give a multiple of 4"):
        sincos_2d(10, (2, 2))
    with pytest.raises(ValueError, match=r"grid \(0, 3\) has no patches; give at least one row and one column"):
        sincos_2d(8, (0, 3))


def test_the_same_grid_is_left_alone():
    pos = sincos_2d(8, (3, 5))
    assert resample(pos, (3, 5), (3, 5)) is pos


def test_resampling_keeps_constants_and_shape_and_dtype():
    pos = torch.full((1, 15, 8), 0.25, dtype=torch.bfloat16)
    got = resample(pos, (3, 5), (7, 4))
    assert got.shape == (1, 28, 8) and got.dtype == torch.bfloat16
    torch.testing.assert_close(got, torch.full_like(got, 0.25))


def test_resampling_keeps_rows_and_columns_apart():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    pos = torch.stack([rows, columns], dim=-1).reshape(24, 2)
    got = resample(pos, (4, 6), (8, 12)).reshape(8, 12, 2)
    centre = got[3:5, 4:8]  # away from the borders a cubic reproduces straight lines
    expected_rows = (torch.arange(3.0, 5.0) + 0.5) / 2 - 0.5
    expected_columns = (torch.arange(4.0, 8.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(centre[..., 0], expected_rows[:, None].expand(2, 4), atol=0.02, rtol=0)
    torch.testing.assert_close(centre[..., 1], expected_columns.expand(2, 4), atol=0.02, rtol=0)


def test_an_embedding_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="has 15 tokens but grid 4 x 4 has 16; pass the grid"):
        resample(torch.zeros(1, 15, 8), (4, 4), (2, 2))
