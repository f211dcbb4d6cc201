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


def compiled_bytes(
    kernel, signature: dict[str, str], constants: dict[str, object], capabilities=CAPABILITIES, **options: int
) -> list[int]:
    """Returns the bytes of the machine code of a Triton kernel for each capability; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel, signature={**signature, **dict.fromkeys(constants, "constexpr")}, constexprs=constants
    )
    targets = [GPUTarget("cuda", capability, 32) for capability in capabilities]
    return [len(triton.compile(source, target=target, options=options).asm["cubin"]) for target in targets]
