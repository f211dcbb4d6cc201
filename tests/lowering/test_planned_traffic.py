"""The planner's bytes per token, parameter and patch are those that were counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ijepa_scale.planning import traffic as planned
from tests.lowering.recorded import FILE, result, start, traffic

PROGRAMS: dict[str, Any] = json.loads(FILE.read_text())["90"]
LAYER = 4 * 1280**2 + 2 * 1280 * 5120  # parameters of a block's products


def test_compiled_blocks() -> None:
    assert traffic(PROGRAMS["dense target block forward"]) == pytest.approx(planned.COMPILED.forward, rel=0.01)
    assert traffic(PROGRAMS["fp8 target block forward"]) == pytest.approx(planned.FP8_FORWARD, rel=0.01)
    for masks in ("dense", "packed", "copies"):
        for role in ("context", "predictor"):
            for direction in ("forward", "backward"):
                found = traffic(PROGRAMS[f"{masks} {role} block {direction}"])
                assert found == pytest.approx(getattr(planned.COMPILED, direction), rel=0.01)


@pytest.mark.parametrize("name", [name for name in PROGRAMS if "last" in name and "fp8" not in name])
def test_last_blocks(name: str) -> None:
    program = PROGRAMS[name]
    assert 0 < program["queries"] < 1
    every, queries = planned.LAST_BLOCK[name.rpartition(" ")[2]]
    assert traffic(program) == pytest.approx(every + queries * program["queries"], rel=0.02)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_casts_of_weights(direction: str) -> None:
    """Biases' gradients are part of them: sums over few tokens at a time."""
    found = {}
    for case in ("dense", "copies"):
        calls = PROGRAMS[f"{case} context block {direction}"]["calls"]
        found[case] = sum(fixed for _, triton, token_bytes, fixed in calls if triton and not token_bytes) / LAYER
    assert found["dense"] == pytest.approx(getattr(planned.CASTS, direction), rel=0.05)
    assert found["copies"] < 0.3


def test_weight_gradients_come_in_fp32_from_the_product() -> None:
    names = [name for name, *_ in PROGRAMS["copies context block backward"]["calls"]]
    assert names.count("extern_kernels.mm_dtype") == 4 and names.count("extern_kernels.mm") == 4


def test_eager_operations() -> None:
    found = result(start("eager"))
    for direction in ("forward", "backward"):
        assert found[direction] == pytest.approx(getattr(planned.EAGER, direction), rel=0.01)
        assert found[f"weights {direction}"] == pytest.approx(getattr(planned.CASTS, direction), rel=0.01)
    assert found["outside dense"] == pytest.approx(planned.OUTSIDE[False], rel=0.02)
    assert found["outside packed"] == pytest.approx(planned.OUTSIDE[True], rel=0.02)
