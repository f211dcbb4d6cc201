"""The FLOP model against torch's counter, for every pretraining configuration, truncated and packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from nominal_flops import step_flops

from ijepa_scale.config import load_config
from ijepa_scale.masks import MaskSampler
from ijepa_scale.planning.flops import mask_flops

CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
IMAGES = 2


@pytest.mark.parametrize("context", ["truncate", "packed"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flops_of_every_configuration_agree_with_torchs_counter(path: Path, context: str) -> None:
    config = load_config(path)
    masks_config = dataclasses.replace(config.masks, context=context, group_size=IMAGES)
    masks = MaskSampler(masks_config, config.model.grid, seed=0)(0, 0, IMAGES, IMAGES)
    measured = step_flops(config.model, masks, num_images=IMAGES)
    counted = mask_flops(config.model, masks, num_images=IMAGES)
    for part, flops in measured.items():
        assert getattr(counted, part) * IMAGES / flops == pytest.approx(1, abs=1e-3), part
    assert counted.total * IMAGES / sum(measured.values()) == pytest.approx(1, abs=1e-3)
