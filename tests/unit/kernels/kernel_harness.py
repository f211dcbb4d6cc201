"""Child processes that kernels' tests share: Triton reads its settings when it is imported, so each needs its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
CAPABILITIES = (80, 90)  # A100; H100 and H200


def run(*arguments: str, **environment: str) -> str:
    """Returns what Python prints with these arguments, in the repository's root; fails as the child fails."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compiled(
    kernel, signature: dict[str, str], constants: dict[str, object], capabilities=CAPABILITIES, **options: int
) -> dict[str, list[int]]:
    """Returns registers, spilled bytes and shared bytes of a Triton kernel by capability; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from tests.lowering.cubins import usage

    typed = {**signature, **dict.fromkeys(constants, "constexpr")}
    return {
        str(capability): list(usage(kernel, typed, constants, None, GPUTarget("cuda", capability, 32), options))
        for capability in capabilities
    }
