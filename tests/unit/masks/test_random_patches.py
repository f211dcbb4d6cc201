"""The sampler of random patches: its masks, and the configurations that it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from ijepa_scale.errors import ConfigError
from ijepa_scale.masks import DenseMasks, MaskSampler, PackedMasks
from ijepa_scale.masks.random_patches import RandomMaskConfig


def sampler(*, seed: int = 3, **changes) -> MaskSampler:
    config = RandomMaskConfig(**{"min_keep": 3, "group_size": 4, "num_context_blocks": 2, **changes})
    return MaskSampler(config, (8, 10), seed=seed)


def test_targets_have_their_size_and_contexts_hold_no_target_patch() -> None:
    masks = sampler(num_target_blocks=3)(5, 0, 4, 8)
    assert isinstance(masks, DenseMasks)
    assert masks.targets.shape == (3, 4, 12) and masks.context.shape == (2, 4, 32)
    for rows in (masks.targets, masks.context):
        assert (rows.diff(dim=-1) > 0).all() and rows.min() >= 0 and rows.max() < 80
    for image in range(4):
        taken = set(masks.targets[:, image].flatten().tolist())
        assert not taken & set(masks.context[:, image].flatten().tolist())
        for blocks in (masks.targets, masks.context):
            assert len({tuple(block.tolist()) for block in blocks[:, image]}) == len(blocks)  # each its own draw


def test_sizes_are_rounded_to_the_nearest() -> None:
    lengths = sampler(target_ratio=0.11, context_ratio=0.195).longest()  # 8.8 and 15.6 of 80 patches
    assert (lengths.target, lengths.context) == (9, 16)


def test_every_patch_is_drawn_equally_often() -> None:
    drawn = sampler(group_size=500, num_context_blocks=1)(0, 0, 500, 500)
    counts = np.bincount(drawn.targets[0].flatten().numpy(), minlength=80) / 500
    assert np.abs(counts - 12 / 80).max() < 0.06  # 3.75 standard errors


def test_masks_depend_on_seed_step_and_position_alone() -> None:
    draw = sampler()
    whole, part = draw(2, 0, 4, 8), draw(2, 2, 2, 8)
    assert (whole.targets[:, 2:] == part.targets).all() and (whole.context[:, 2:] == part.context).all()
    assert not (draw(3, 0, 4, 8).targets == whole.targets).all()
    assert not (sampler(seed=4)(2, 0, 4, 8).targets == whole.targets).all()
    assert not (draw(2, 4, 4, 8).targets == whole.targets).all()
    assert isinstance(draw(2, 0, 8, 8), PackedMasks)


def test_the_longest_masks_are_those_drawn() -> None:
    lengths = sampler().longest()
    assert (lengths.context, lengths.target) == sampler()(0, 0, 4, 4).mean_tokens()


def test_impossible_configurations_are_refused() -> None:
    for lengths in ({"target_ratio": 0.05}, {"context_ratio": 0.05}):  # 4 of 80 patches
        sampler(min_keep=3, **lengths)
        with pytest.raises(ConfigError, match="each must hold more than min_keep"):
            sampler(min_keep=4, **lengths)
    sampler(context_ratio=0.4)  # 32 patches, all that 4 targets of 12 may leave
    with pytest.raises(ConfigError, match=r"but of 80 patches a target holds 8 and the context 32, and"):
        sampler(min_keep=10, target_ratio=0.1)
    with pytest.raises(ConfigError, match=r"needs 40 patches, but 4 targets of 12 may leave only 32 of 80; lower"):
        sampler(context_ratio=0.5)
