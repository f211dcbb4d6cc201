"""The DeepSpeed files that docs/scaling.md recommends train as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.harness import run
from tests.distributed.test_engines import FEW_STEPS, loss_difference, reference, worst
from tests.distributed.training import curve
from tests.unit.planning.test_scaling_page import CLUSTERS, block


@pytest.mark.parametrize(  # the first is ds_configs/zero1.json
    "heading",
    [pytest.param(name, marks=pytest.mark.long if place else ()) for place, name in enumerate(list(CLUSTERS)[1:])],
)
def test_fp32_training_equals_one_process(heading: str, tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(block(heading, "json")))
    engine = {"strategy": "deepspeed", "ds_config": str(file), "precision": "fp32", "accumulation": 2}
    found, expected = run(curve, 2, engine, {}, {}, FEW_STEPS)[0], reference(steps=FEW_STEPS)
    assert loss_difference(found, expected) < 1e-6 and worst(found, expected, "target.") < 1e-6
