"""What the programs of compiled blocks were when they were last recorded.

python -m tests.lowering.recorded      # in the root of the repository: measures and records them again
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "recorded.json"
ROOT = Path(__file__).parents[2]
CAPABILITIES = ("80", "90")  # A100; H100 and H200
AGAIN = "if that is meant, record it: python -m tests.lowering.recorded"


def start(*arguments: str, module: str = "tests.lowering.child") -> subprocess.Popen[str]:
    """Returns the child process with these arguments, running."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def result(child: subprocess.Popen[str]) -> Any:
    """Returns what a child process printed, read as JSON; fails as it fails."""
    out, error = child.communicate(timeout=600)
    assert child.returncode == 0, error[-4000:]
    return json.loads(out)


def measured() -> dict[str, Any]:
    """Returns the programs for each capability, measured side by side."""
    children = {capability: start("lowered", capability) for capability in CAPABILITIES}
    return {capability: result(child) for capability, child in children.items()}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Returns what changed in a program, kernel by kernel."""
    lists = [[tuple(call) for call in program["calls"]] for program in (found, expected)]
    lines = []
    for word, calls, others in (("new", *lists), ("gone", *reversed(lists))):
        left = list(others)
        for call in calls:
            if call in left:
                left.remove(call)
            else:
                name, _, token_bytes, fixed_bytes = call
                lines.append(f"{word}: {name}, {token_bytes:g} bytes per token and channel, {fixed_bytes} of weights")
    return lines


def traffic(program: dict[str, Any]) -> float:
    """Returns the bytes that a program's Triton kernels move, per token and channel of the block's input."""
    return sum(token_bytes for _, triton, token_bytes, _ in program["calls"] if triton)


if __name__ == "__main__":
    programs = measured()
    programs["own kernels"] = result(start(module="tests.unit.kernels.compile_kernels"))
    FILE.write_text(json.dumps(programs, indent=1) + "\n")
    for name, program in programs["90"].items():
        print(f"{name}: {traffic(program):.1f} bytes per token and channel, {len(program['calls'])} calls")
