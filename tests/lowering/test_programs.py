"""What Inductor makes of the blocks for A100 and H100: kernels, memory traffic, registers, spills."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lowering.recorded import AGAIN, CAPABILITIES, FILE, differences, measured, result, start, traffic

EXPECTED: dict[str, Any] = json.loads(FILE.read_text())


pytestmark = pytest.mark.long  # compiling all programs takes a minute


@pytest.fixture(scope="module")
def programs() -> dict[str, Any]:
    return measured()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_pass_over_memory_is_added(programs: dict[str, Any], capability: str) -> None:
    found, expected = programs[capability], EXPECTED[capability]
    assert found.keys() == expected.keys()
    changed = {name: lines for name in found if (lines := differences(found[name], expected[name]))}
    told = [f"{name}: {traffic(found[name]):g} instead of {traffic(expected[name]):g}" for name in changed]
    assert not changed, "\n".join([*told, *(line for lines in changed.values() for line in lines), AGAIN])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(programs: dict[str, Any], capability: str) -> None:
    """Of the configurations that Inductor times, one at least must keep everything in registers."""
    for program, shown in programs[capability].items():
        for kernel, configurations in shown["kernels"].items():
            spilled = min(spilled for _, spilled, _ in configurations)
            assert spilled == 0, f"{kernel} of {program} spills {spilled} bytes per thread"
            assert configurations == EXPECTED[capability][program]["kernels"][kernel], f"{kernel} of {program}; {AGAIN}"


def test_another_pass_is_noticed() -> None:
    """A product in fp32 moves more bytes; the message names the kernel that writes them."""
    found = result(start("lowered", "90", "float"))["dense context block forward"]
    expected = EXPECTED["90"]["dense context block forward"]
    assert traffic(found) > traffic(expected)
    assert any(line.startswith("new: fused") and "gelu" in line for line in differences(found, expected))
