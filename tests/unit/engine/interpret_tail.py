"""Trains with the fused tail's Triton kernel under the interpreter, and prints how far that is from AdamW."""

from __future__ import annotations

import json
from typing import Any

from tests.unit.engine.test_engine_tail import pretraining, state, take

CASES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "clip": 0.05, "late": True},
    "fp8": {"precision": "bf16", "target_precision": "fp8", "late": True},
}
STEPS = 3


def apart(options: dict[str, Any]) -> tuple[float, float, float]:
    """Returns the largest differences: of losses, relative, of the target's values, and of trained weights."""
    fused, plain = pretraining("fused_tail", **options), pretraining("torch", **options)
    losses = []
    for step in range(STEPS):
        found, expected = take(fused, step), take(plain, step)
        losses.append(float((found - expected).abs() / expected))
    found, expected = state(fused), state(plain)
    kinds = ("target.", "model.")
    worst = [
        max(float((found[name] - expected[name]).abs().max()) for name in expected if name.startswith(kind))
        for kind in kinds
    ]
    return max(losses), worst[0], worst[1]


if __name__ == "__main__":
    print(json.dumps({name: apart(options) for name, options in CASES.items()}))
