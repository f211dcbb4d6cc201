"""What a measurement costs, by counted FLOPs. Its figures are compared in tests/distributed/test_health.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ijepa_scale.config import load_config
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.evaluator import image_settings
from ijepa_scale.evaluate.health import HealthCheck
from ijepa_scale.objectives.protocol import build_objective

ROOT = Path(__file__).parents[3]
WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def check(name: str, images: int, *overrides: str) -> HealthCheck:
    config = load_config(ROOT / "configs" / name, ["data.train=/nowhere", *overrides])
    size = config.model.image_size
    return HealthCheck(
        config, SyntheticSource(images, size, seed=0), "data.train", images=image_settings(config),
        objective=build_objective(config.objective), world=WORLD, chunk=64,
    )  # fmt: skip


def test_by_default_it_takes_less_than_a_hundredth_of_the_published_run() -> None:
    health = check("in1k_vith14_ep300.yaml", 300)
    assert health.total == 256
    share = health.share(2048)
    assert 0.0005 < share < 0.01, share


def test_one_image_cannot_be_compared() -> None:
    with pytest.raises(
        DataError, match="data.train: 1 image can be used; health needs at least 2, or set health.every=0"
    ):
        check("demo.yaml", 1)
