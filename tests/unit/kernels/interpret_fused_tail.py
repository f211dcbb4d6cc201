"""Runs fused_tail's Triton kernels under the interpreter (TRITON_INTERPRET=1), and prints how far they are off."""

from __future__ import annotations

import json

from ijepa_kernels.fused_tail import fused_tail, prepare
from tests.unit.kernels.test_fused_tail import RATES, WEIGHTS, clone, compare, gradients_of, weights_of


def comparisons() -> dict[str, dict[str, float]]:
    """Returns for each case the differences from AdamW, target update and copies after several steps."""
    plain = [(shape, group, has.translate(str.maketrans("", "", "ctb8"))) for shape, group, has in WEIGHTS]
    bf16 = [case for case in WEIGHTS if "8" not in case[2]]
    even = [((16, 16), 0, "ctb"), ((2, 1040), 1, "ct8"), ((2000 + 1,), 2, "c")]  # all allow wide loads
    return {
        "all": compare("triton"),
        "aligned": compare("triton", even),
        "clipped": compare("triton", scale=0.25, steps=5, bad=(2,)),
        "no target": compare("triton", plain, steps=5, bad=()),
        "no fp8": compare("triton", bf16, steps=5, bad=()),
        "odd addresses": compare("triton", bf16, shift=1, steps=5),
        "wide rows": compare("triton", [((1, 6144), 0, "ct8"), ((0, 64), 1, "t8")], steps=3, bad=(1,)),
    }


def rules() -> dict[str, object]:
    """Returns what a table of other tensors makes the kernel say, and that gradients may move and no table be given."""
    weights = gradients_of(weights_of(WEIGHTS[:3]), 0)
    table = prepare(weights)
    try:
        fused_tail(clone(weights), RATES, momentum=0.9, table=table, implementation="triton")
        text = "ran"
    except ValueError as error:
        text = str(error)
    expected = clone(weights)
    for step in range(2):
        fused_tail(gradients_of(weights, step), RATES, momentum=0.9, table=table, implementation="triton")
        fused_tail(gradients_of(expected, step), RATES, momentum=0.9, implementation="triton")
    fused_tail([], [], implementation="triton")
    same = all(bool((a.value == b.value).all()) for a, b in zip(weights, expected, strict=True))
    shapes = [[((16, 64), 0, "ct8")], [((70,), 0, "c")], [((16, 1001), 0, "ct8")], [((16, 64), 0, "ctb")]]
    wide = [prepare(weights_of(case, shift=index // 3)).aligned for index, case in enumerate(shapes)]
    return {"other": text, "without a table": same, "wide loads": wide}


if __name__ == "__main__":
    print(json.dumps({"comparisons": comparisons(), "rules": rules()}))
