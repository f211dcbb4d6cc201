"""One process with batch 8 and two with batch 4 see the same samples, crops, augmentation and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_scale.augment import Augment
from ijepa_scale.config import AugmentConfig, BlockMaskConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.masks import DenseMasks, MaskSampler, PackedMasks
from tests.distributed.commands import write_data, write_photos

BATCH, STEPS = 8, 14  # 14 steps of 8 are more than two passes over the 50 images
AUGMENT = AugmentConfig(flip=0.5, color_jitter=0.5, grayscale=0.3, blur=0.5)


@pytest.fixture(scope="module", params=["shards", "imagefolder", "list"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("set")
    shards = write_data(folder / "shards")
    return request.param, shards if request.param == "shards" else write_photos(shards, folder)[request.param]


def seen(
    data: tuple[str, Path], world: int, accumulation: int, masks: BlockMaskConfig
) -> tuple[np.ndarray, torch.Tensor, list]:
    """Returns the sample ids, (steps, batch), the augmented images, and each image's context and target patches."""
    ids, images, patches = [], [], []
    for rank in range(world):
        source = build_source(*data)
        order = SampleOrder(source.shard_sizes, BATCH, seed=1, window_shards=2)
        loader = TrainLoader(source, order, AUGMENT, (32, 32), seed=1, rank=rank, world=world, stop_step=STEPS)
        augment = Augment(AUGMENT, (32, 32), seed=1)
        sampler = MaskSampler(masks, (8, 8), seed=1)
        for batch in loader:
            for micro in batch.split(accumulation):
                ids.append((micro.step, micro.position, micro.sample_ids))
                images.append((micro.step, micro.position, augment(micro)))
                drawn = sampler(micro.step, micro.position, len(micro), BATCH)
                patches += [(micro.step, micro.position + i, *of_image(drawn, i)) for i in range(len(micro))]
    ids.sort(key=lambda entry: entry[:2])
    images.sort(key=lambda entry: entry[:2])
    return np.concatenate([e[2] for e in ids]), torch.cat([e[2] for e in images]), sorted(patches)


def of_image(masks: DenseMasks | PackedMasks, image: int) -> tuple[list[int], list[list[int]]]:
    if isinstance(masks, DenseMasks):
        return masks.context[0, image].tolist(), masks.targets[:, image].tolist()
    context = masks.context_index.split(list(masks.context_layout.lengths))[image] % 64
    count = len(masks.context_layout.lengths)
    lengths = [p - masks.context_layout.lengths[s % count] for s, p in enumerate(masks.predictor_layout.lengths)]
    targets = masks.target_index.split(lengths)
    return context.tolist(), [(targets[block * count + image] % 64).tolist() for block in range(len(targets) // count)]


@pytest.mark.parametrize(
    "masks", [{"group_size": 8}, {"group_size": 3}, {"context": "packed"}, {"sampler": "reference"}]
)
@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (4, 2), (8, 1)])
def test_division_changes_nothing(data: tuple[str, Path], world: int, accumulation: int, masks: dict) -> None:
    config = BlockMaskConfig(**{"min_keep": 3, "group_size": 8, **masks})
    ids, images, patches = seen(data, 1, 1, config)
    other_ids, other_images, other_patches = seen(data, world, accumulation, config)
    assert len(ids) == BATCH * STEPS and len(set(ids[:48].tolist())) == 48
    assert np.array_equal(ids, other_ids)
    assert torch.equal(images, other_images)
    assert patches == other_patches
