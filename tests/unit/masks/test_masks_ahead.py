"""The patches that the target encoder computes, and masks that are drawn ahead."""

from __future__ import annotations

import threading

import pytest
import torch

from ijepa_scale.config import BlockMaskConfig
from ijepa_scale.masks import DenseMasks, MasksAhead, MaskSampler, Wanted
from ijepa_scale.masks.types import target_index


def sampler(**changes) -> MaskSampler:
    return MaskSampler(BlockMaskConfig(**{"group_size": 4, **changes}), (14, 14), seed=3)


@pytest.mark.parametrize("context", ["truncate", "packed"])
def test_each_target_patch_is_wanted_once(context) -> None:
    masks = sampler(context=context)(5, 0, 4, 4)
    wanted = Wanted.of(masks, 4, 196)
    index = target_index(masks, 196)
    flat = (wanted.patches + 196 * torch.arange(4)[:, None]).flatten()
    assert torch.equal(flat[wanted.rows], index), "rows lead to the targets"
    assert all(len(set(row)) == len(row) for row in wanted.patches.tolist())
    most = max(len(set(index[index // 196 == b].tolist())) for b in range(4))
    assert wanted.patches.shape == (4, most), "no more than the image with the most target patches needs"


def test_images_with_fewer_target_patches_are_filled_up_with_others() -> None:
    targets = torch.tensor([[[1, 2], [0, 1]], [[3, 4], [0, 1]]])
    wanted = Wanted.of(DenseMasks(torch.tensor([[[5], [5]]]), targets), 2, 6)
    assert wanted.patches.tolist() == [[1, 2, 3, 4], [0, 1, 2, 3]]
    assert wanted.rows.tolist() == [0, 1, 4, 5, 2, 3, 4, 5]


def test_masks_drawn_ahead_are_the_samplers() -> None:
    draw = sampler()
    ahead = MasksAhead(draw, "cpu")
    calls = [(0, 0, 2), (0, 2, 2), (1, 0, 2), (1, 2, 2), (2, 0, 4), (7, 0, 4), (8, 0, 4), (3, 0, 4)]
    for step, first, count in calls:  # in order, divided differently, jumping forward and back
        masks, wanted = ahead(step, first, count, 4)
        expected = sampler()(step, first, count, 4)
        assert torch.equal(masks.context, expected.context) and torch.equal(masks.targets, expected.targets)
        assert torch.equal(wanted.rows, Wanted.of(expected, count, 196).rows)
        assert len(ahead._drawn) <= 3, "masks of earlier steps are dropped"


def test_the_next_step_is_drawn_on_another_thread() -> None:
    draw = sampler()
    threads: dict[int, str] = {}

    class Watched(MaskSampler):
        def __call__(self, step: int, first: int, count: int, batch_size: int):
            threads[step] = threading.current_thread().name.partition("_")[0]
            return draw(step, first, count, batch_size)

    ahead = MasksAhead(Watched(draw.config, draw.grid, seed=3), "cpu")
    for step in (0, 1, 2, 7, 8):
        ahead(step, 0, 4, 4)
    own = threading.current_thread().name
    assert {step: threads[step] for step in (0, 1, 2, 7, 8)} == {0: own, 1: "masks", 2: "masks", 7: own, 8: "masks"}


def test_positions_outside_the_batch_are_refused_at_the_call() -> None:
    ahead = MasksAhead(sampler(), "cpu")
    with pytest.raises(ValueError, match="are not part of a batch of 4"):
        ahead(0, 3, 2, 4)
