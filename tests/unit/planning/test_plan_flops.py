"""Compares the FLOP model with torch's counter, for every pretraining configuration, truncated and packed."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale.config import BlockMaskConfig, ModelConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.masks import MaskSampler
from ijepa_scale.models import build_jepa
from ijepa_scale.planning.flops import FlopCount, forward_flops, mask_flops
from tests.unit.config.writing import load_shipped
from tests.unit.planning.nominal_flops import step_flops

CONFIGS = sorted(Path(__file__).parents[3].glob("configs/*.yaml"))
IMAGES = 2


@functools.lru_cache(maxsize=32)
def _counts(model: ModelConfig, masks_config: BlockMaskConfig) -> tuple[dict[str, int], FlopCount]:
    """Returns the FLOPs that torch counts and those of the FLOP model; cached for configurations that share them.

    Torch counts models of one block and of two; each further block adds as much as the second. That is exact, as the
    test on a whole model below checks.
    """
    masks = MaskSampler(masks_config, model.grid, seed=0)(0, 0, IMAGES, IMAGES)
    one, two = (step_flops(model.replace(depth=n, predictor_depth=n), masks, num_images=IMAGES) for n in (1, 2))
    sizes = resolve(model)
    depths = {"target": sizes.depth, "context": sizes.depth, "predictor": sizes.predictor_depth}
    measured = {part: one[part] + (depth - 1) * (two[part] - one[part]) for part, depth in depths.items()}
    return measured, mask_flops(model, masks, num_images=IMAGES)


@pytest.mark.parametrize("context", ["truncate", "packed"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flops_of_every_configuration_agree_with_torchs_counter(path: Path, context: str) -> None:
    config = load_shipped(path)
    masks_config = config.masks.replace(context=context, group_size=IMAGES)
    measured, counted = _counts(config.model, masks_config)
    for part, flops in measured.items():
        assert getattr(counted, part) * IMAGES / flops == pytest.approx(1, abs=1e-3), part
    assert counted.total * IMAGES / sum(measured.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("context", ["truncate", "packed"])
def test_blocks_cost_alike(context: str) -> None:
    model, masks_config = ModelConfig(name="vit_small"), BlockMaskConfig(context=context, group_size=IMAGES)
    masks = MaskSampler(masks_config, model.grid, seed=0)(0, 0, IMAGES, IMAGES)
    assert step_flops(model, masks, num_images=IMAGES) == _counts(model, masks_config)[0]


def test_the_forward_of_context_and_predictor_is_that_of_the_step() -> None:
    """The real forward embeds only kept patches, and computes only used tokens in last blocks."""
    model = ModelConfig(name="vit_tiny", image_size=64, patch_size=8, depth=6, predictor_depth=6)
    masks = MaskSampler(BlockMaskConfig(min_keep=3, group_size=4), model.grid, seed=0)(0, 0, 4, 4)
    module, counter = build_jepa(model, seed=0, device="meta"), FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(torch.empty(4, 3, 64, 64, device="meta"), masks.map(lambda tensor: tensor.to("meta")))
    most = 4 * forward_flops(model, mask_flops(model, masks, num_images=4))
    assert 0.85 * most < counter.get_total_flops() < most
