import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_kernels.attention import SequenceLayout
from ijepa_scale.masks.types import DenseMasks, PackedMasks
from ijepa_scale.metrics.plots import draw_masks, mask_grids

GRID = (3, 4)
CONTEXT = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]  # (E, B, K)
TARGETS = [[[8], [9]], [[10], [11]], [[8], [11]]]  # (M, B, T)


def packed() -> PackedMasks:
    n = GRID[0] * GRID[1]
    context_index = torch.tensor([b * n + p for block in CONTEXT for b, places in enumerate(block) for p in places])
    target_index = torch.tensor(
        [b * n + p for block in TARGETS for _ in CONTEXT for b, places in enumerate(block) for p in places]
    )
    none = torch.empty(0)
    return PackedMasks(
        context_index=context_index,
        context_layout=SequenceLayout.of([2] * 4),
        target_index=target_index,
        predictor_layout=SequenceLayout.of([3] * 12),
        predictor_source=none,
        target_rows=none,
        target_layout=SequenceLayout.of([1] * 12),
        weights=none,
    )


@pytest.mark.parametrize("masks", [DenseMasks(torch.tensor(CONTEXT), torch.tensor(TARGETS)), packed()], ids=type)
def test_mask_grids_say_which_patches(masks):
    context, targets = mask_grids(masks, 2, GRID)
    assert context.shape == (2, 2, 3, 4) and targets.shape == (2, 3, 3, 4)
    for b in range(2):
        for e, block in enumerate(CONTEXT):
            assert np.flatnonzero(context[b, e]).tolist() == block[b]
        for m, block in enumerate(TARGETS):
            assert np.flatnonzero(targets[b, m]).tolist() == block[b]


def test_masks_are_drawn(tmp_path):
    images = torch.full((2, 3, 12, 16), 200, dtype=torch.uint8)
    context, targets = mask_grids(DenseMasks(torch.tensor(CONTEXT), torch.tensor(TARGETS)), 2, GRID)
    png = draw_masks(images, context, targets, tmp_path / "masks.png")
    assert Image.open(png).size[0] > 300
    as_floats = draw_masks(images / 255, context, targets, tmp_path / "floats.png")
    assert np.array_equal(np.asarray(Image.open(png)), np.asarray(Image.open(as_floats)))
