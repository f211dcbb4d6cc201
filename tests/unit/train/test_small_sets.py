"""A set that is too small for the run is refused with settings that then work, whatever the sizes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.augment.mixing import check_pairs
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.yaml_text import nest
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.errors import UserError
from ijepa_scale.train.setup import check_size, global_batch

_SETTING = re.compile(r"([a-z_]+\.[a-z_]+)=(\d+)")


def check(kind: type, settings: dict[str, Any], images: int, processes: int) -> None:
    """Does what a task does about sizes before it reads an image."""
    config = kind(**nest(settings))
    source = SyntheticSource(images, (32, 32))
    batch = global_batch(config, processes)
    if kind is FinetuneConfig:
        check_pairs(batch, processes * config.engine.accumulation, config.augment)
    check_size(config, source, batch, processes)
    order = SampleOrder(np.array([images]), batch, 0, 1)
    assert order.steps_per_epoch > 0
    for rank in range(processes):
        assert len(order.part(0, rank, processes)) * processes == batch


@given(
    st.sampled_from([PretrainConfig, FinetuneConfig]),
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_settings_of_a_refusal_lead_to_a_start(
    kind: type, images: int, batch: int, processes: int, accumulation: int, per_process: bool, mixes: bool
) -> None:
    settings = {
        "data.batch_size_per_process" if per_process else "data.batch_size": batch,
        "engine.accumulation": accumulation,
        **({"augment.mixup": 0.8 * mixes, "augment.cutmix": 0.0} if kind is FinetuneConfig else {}),
    }
    said: list[str] = []
    while True:
        try:
            check(kind, settings, images, processes)
            break
        except UserError as error:
            text = str(error)
        assert "\n" not in text and len(said) < 2, [*said, text]
        # what is said of the set's size is the last that is said
        assert not any("the set has" in each for each in said), [*said, text]
        said.append(text)
        advised = dict(_SETTING.findall(text.partition(", or set ")[0]))
        assert "data.batch_size" in advised
        settings.pop("data.batch_size_per_process", None)
        settings |= {name: int(value) for name, value in advised.items()}
        if "start 1 process with " in text:
            assert images < processes
            processes = 1


@pytest.mark.parametrize(
    ("kind", "images", "settings", "processes", "text"),
    [
        (PretrainConfig, 1, {"data.batch_size": 8}, 2, "1 image, fewer than one batch of 8; start 1 process with "
         "data.batch_size=1, or give more images"),
        (PretrainConfig, 100, {"data.batch_size": 192}, 3, "100 images, .*; set data.batch_size=96, or"),
        (PretrainConfig, 3, {"data.batch_size": 8, "engine.accumulation": 4}, 2, "set data.batch_size=2 "
         "engine.accumulation=1, or"),
        (FinetuneConfig, 3, {"data.batch_size": 8}, 2, "set data.batch_size=2 augment.mixup=0 augment.cutmix=0, or"),
        (FinetuneConfig, 5, {"data.batch_size": 8}, 2, "5 images, .*; set data.batch_size=4, or"),
    ],
)  # fmt: skip
def test_the_refusal_of_a_small_set(
    kind: type, images: int, settings: dict[str, Any], processes: int, text: str
) -> None:
    with pytest.raises(UserError, match=text):
        check(kind, settings, images, processes)
