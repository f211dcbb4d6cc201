"""Runs in a process of its own, since it pretends that there is a GPU; prints JSON.

python -m tests.lowering.child graphs | eager | lowered CAPABILITY [SPOIL]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ijepa_scale.models import layers
from tests.lowering.cubins import generated
from tests.lowering.eager import counted
from tests.lowering.lower import Program, lower
from tests.lowering.pretend import Gpu
from tests.lowering.roles import trace

# masks, precision of the target, checkpointing: every value of each, without all combinations
TRACED = [
    ("dense", "bf16", "none"), ("dense", "fp8", "selective"), ("dense", "bf16", "full"),
    ("packed", "fp8", "none"), ("packed", "bf16", "selective"), ("packed", "bf16", "full"),
]  # fmt: skip
# The target's blocks don't depend on the masks, and the others not on the target's precision.
LOWERED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dense": ({}, ("target", "context", "predictor")),
    "packed": ({"masks": "packed"}, ("context", "predictor")),
    "copies": ({"copies": True}, ("context", "predictor")),  # with the fused tail
    "fp8": ({"precision": "fp8"}, ("target",)),
}


def graphs() -> list[dict[str, Any]]:
    """Returns the number of graphs of each role and of different lengths, for each case."""
    gpu = Gpu(90)
    found = []
    for masks, precision, checkpointing in TRACED:
        traced = trace(gpu, masks, precision=precision, checkpointing=checkpointing)
        case = f"{masks}, {precision} target, checkpointing {checkpointing}"
        found.append({"case": case, "graphs": traced.counts(), "lengths": len(traced.lengths)})
    return found


def lowered(capability: int, names: Sequence[str] = (*LOWERED,), roles: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the calls and the kernels' usage of the programs, by "masks role block pass"."""
    gpu = Gpu(capability)
    found: dict[str, Any] = {}
    for case in names:
        options, all_roles = LOWERED[case]
        traced = trace(gpu, **{"masks": "dense", **options}, steps=2)
        seen: set[str] = set()
        for graph in traced.graphs:
            block = "last block" if graph.role in seen else "block"
            seen.add(graph.role)
            if graph.role in (roles or all_roles):
                for name, program in lower(graph, gpu).items():
                    found[f"{case} {graph.role} {block} {name}"] = _shown(program)
    return found


def _shown(program: Program) -> dict[str, Any]:
    return {
        "queries": round(program.queries, 4),
        "calls": [list(dataclasses.astuple(call)) for call in program.calls],
        "kernels": {name: [list(each) for each in generated(source)] for name, source in program.sources.items()},
    }


def _graph_break(module: layers.Mlp, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return module.fc2(F.gelu(module.fc1(x)))


def _float(module: layers.Mlp, x: torch.Tensor) -> torch.Tensor:
    hidden = F.gelu(module.fc1(x))
    with torch.autocast(hidden.device.type, enabled=False):
        return module.fc2(hidden.float())


SPOILS = {"graph_break": _graph_break, "float": _float}  # what the tests must notice


def main() -> None:
    """Prints what the arguments ask for."""
    what, *rest = sys.argv[1:]
    if len(rest) > 1:
        layers.Mlp.forward = SPOILS[rest[1]]  # type: ignore[method-assign]
        found: Any = lowered(int(rest[0]), ["dense"], ["context"])
    elif rest:  # sm_80 has no fp8 products, and its other blocks have the kernels of the dense ones
        found = lowered(int(rest[0]), ["dense"] if rest[0] == "80" else (*LOWERED,))
    else:
        found = {"graphs": graphs, "eager": counted}[what]()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
