"""Compiles Triton kernels to machine code for a GPU that isn't there, and reads registers, spills and shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Usage(NamedTuple):
    """What the machine code of a kernel takes."""

    registers: int  # per thread
    spilled: int  # bytes per thread in local memory
    shared: int  # bytes per block


def usage(fn: Any, signature: dict[str, str], constants: dict[str, Any], attributes: Any, target: GPUTarget,
          options: dict[str, Any]) -> Usage:  # fmt: skip
    """Returns what a kernel takes that is compiled with these options."""
    built = triton.compile(ASTSource(fn, signature, constants, attributes), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        shown = subprocess.run(
            [_TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, _, local = map(int, _USAGE.search(shown.stdout).groups())  # type: ignore[union-attr]
    return Usage(registers, stack + local, built.metadata.shared)


def generated(source: str) -> Iterator[Usage]:
    """Yields what each configuration takes among which Inductor's kernel of this source would choose by timing."""
    triton_helpers.set_driver_to_gpu = lambda: None
    file = _saved(source)
    names: dict[str, Any] = {"__name__": "generated", "__file__": file}
    exec(compile(source, file, "exec"), names)  # noqa: S102
    (kernel,) = (value for value in names.values() if isinstance(value, CachingAutotuner))
    for config in kernel.configs:
        meta = kernel._create_compile_meta(config)
        target = GPUTarget("cuda", meta["cc"], 32)
        options = kernel._create_compile_options(config, meta)
        yield usage(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0], target, options)


def _saved(source: str) -> str:
    """Returns a file with this source, which Triton reads again."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(source)
    return file.name
