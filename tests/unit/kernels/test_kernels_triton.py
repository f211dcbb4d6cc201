"""The Triton kernels: against their references under the interpreter, and compiled for GPUs that aren't there."""

import json

import pytest

from tests.lowering.recorded import AGAIN, FILE
from tests.unit.kernels.kernel_harness import CAPABILITIES, run

# Sums in another order in fp32. The interpreter cuts bf16 off where a GPU rounds (2^-7 each), and the gradient
# becomes bf16 twice where the upstream one isn't 1.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-6}


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(run("-m", "tests.unit.kernels.interpret_kernels", TRITON_INTERPRET="1").splitlines()[-1])


def test_target_loss_equals_the_reference(interpreted):
    found = interpreted["target_loss"]
    assert len(found) == 42
    for name, off in found.items():
        assert off["loss"] < 1e-6, (name, off)  # fp32 whatever the inputs are
        assert off["gradient"] < TOLERANCE["bfloat16" if "bfloat16" in name else "float32"], (name, off)


def test_target_loss_keeps_its_promises(interpreted):
    found = interpreted["target_loss rules"]
    assert found["same bits"] and found["outside is NaN"] and found["no graph"]
    assert "modified by an inplace operation" in found["second backward"]
    assert found["compiled"] < 1e-6


def test_target_update_equals_the_reference(interpreted):
    found = interpreted["target_update"]
    assert len(found) == 24
    for name, off in found.items():
        assert off["target"] <= 1, (name, off)
        assert off["copies"] < 2**-7, (name, off)  # cut off, not rounded, by the interpreter
        assert off["source kept"], name
        assert (off["moved"] > 0) == ("flag 2.0" not in name and not name.startswith("1.0")), (name, off)


def test_target_update_wants_a_table_of_its_tensors(interpreted):
    found = interpreted["target_update rules"]
    assert found["other"] == "the table was made for other tensors, or they have moved; call prepare again with these"
    assert found["without"] < 1e-6


def test_fused_tail_equals_adamw_target_update_and_copies():
    found = json.loads(run("-m", "tests.unit.kernels.interpret_fused_tail", TRITON_INTERPRET="1").splitlines()[-1])
    assert len(found["comparisons"]) == 7
    for name, off in found["comparisons"].items():
        assert not off["moved"] and off["step"] == 0, (name, off)
        assert max(off["value"], off["target"]) <= 1e-7 and off["scales"] <= 1e-9, (name, off)
        assert max(off["exp_avg"], off["exp_avg_sq"]) <= 1e-6, (name, off)
        # one step of the format: the interpreter cuts off where a GPU rounds
        assert max(off["copy"], off["target_copy"], off["quantised"]) <= 1, (name, off)
    assert found["rules"]["other"].startswith("the table was made for other tensors, or they have moved; call prepare")
    assert found["rules"]["without a table"]
    assert found["rules"]["wide loads"] == [True, True, False, False]  # an odd size; odd rows; odd addresses


def test_the_kernels_compile_without_spills(tmp_path):
    found = json.loads(run("-m", "tests.unit.kernels.compile_kernels", TRITON_CACHE_DIR=str(tmp_path)).splitlines()[-1])
    for name, by_capability in found.items():
        assert len(by_capability) == (1 if "fp8" in name else len(CAPABILITIES)), name
        assert all(spilled == 0 for _, spilled, _ in by_capability.values()), (name, by_capability)
    assert found == json.loads(FILE.read_text())["own kernels"], AGAIN


@pytest.mark.long
def test_a_spilling_tile_is_noticed(tmp_path):
    shown = run("-m", "tests.unit.kernels.compile_kernels", "too_large", TRITON_CACHE_DIR=str(tmp_path)).splitlines()[
        -1
    ]
    assert all(spilled > 0 for _, spilled, _ in json.loads(shown).values())
