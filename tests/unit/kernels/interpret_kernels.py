"""Runs Triton kernels under the interpreter (TRITON_INTERPRET=1) and prints how far they are from the references."""

from __future__ import annotations

import json

import torch

from ijepa_kernels.target_loss import target_loss
from ijepa_kernels.target_update import prepare, target_update
from tests.unit.kernels.test_target_loss import inputs
from tests.unit.kernels.test_target_update import lists, ulps

LOSS_CASES = {  # R, S, D
    "several rows a program": (13, 5, 100),
    "odd width": (3, 4, 37),
    "one value": (1, 1, 1),
    "1280": (4, 6, 1280),
    "1408": (2, 6, 1408),
    "wide": (2, 2, 9000),
    "no rows": (0, 3, 16),
}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, in units of the largest expected magnitude; inf where shapes or dtypes differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype or not bool(found.isfinite().all()):
        return float("inf")
    if not found.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-12))


def losses() -> dict[str, dict[str, float]]:
    """Returns for each case the distance of loss and gradient: upstream gradient 1 and 0.7, strided inputs."""
    found = {}
    for name, case in LOSS_CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for options, weighted, upstream, strided in (
                ({"loss": "smooth_l1"}, True, 1.0, False),
                ({"loss": "smooth_l1", "beta": 0.3}, False, 0.7, True),
                ({"loss": "l2"}, True, 0.7, True),
            ):
                prediction, tokens, lookup, weights = inputs(*case, dtype=dtype, token_dtype=dtype)
                if strided:  # rows apart, columns apart, and indices apart
                    prediction = torch.cat([prediction.detach()] * 2, dim=1)[:, : case[2]].requires_grad_()
                    tokens, lookup = tokens.repeat_interleave(2, dim=1)[:, ::2], lookup.repeat_interleave(2)[::2]
                pair = []
                for implementation in ("triton", "reference"):
                    loss = target_loss(
                        prediction, tokens, lookup, weights if weighted else None,
                        implementation=implementation, **options,
                    )  # fmt: skip
                    pair.append((loss.detach(), torch.autograd.grad(loss * upstream, prediction)[0]))
                key = f"{name}, {str(dtype)[6:]}, {options}, {upstream}"
                found[key] = {"loss": off(pair[0][0], pair[1][0]), "gradient": off(pair[0][1], pair[1][1])}
    return found


def loss_rules() -> dict[str, object]:
    """Returns what the kernel does apart from its numbers: the same bits again, a second backward, an index outside."""
    prediction, tokens, lookup, weights = inputs(5, 7, 300)
    loss = target_loss(prediction, tokens, lookup, weights, implementation="triton")
    again = target_loss(prediction, tokens, lookup, weights, implementation="triton")
    loss.backward(retain_graph=True)
    try:
        loss.backward()
        second = "ran"
    except RuntimeError as error:
        second = str(error)
    lookup[0] = 7
    outside = target_loss(prediction, tokens, lookup, weights, implementation="triton")
    with torch.no_grad():
        quiet = target_loss(prediction, tokens, lookup * 0, weights, implementation="triton")
    compiled = torch.compile(
        lambda *values: target_loss(*values, implementation="triton"), fullgraph=True, backend="aot_eager"
    )
    prediction.grad, expected = None, prediction.grad
    compiled(prediction, tokens, inputs(5, 7, 300)[2], weights).backward()
    return {
        "same bits": torch.equal(loss, again),
        "second backward": second,
        "outside is NaN": bool(outside.isnan()),
        "no graph": not quiet.requires_grad,
        "compiled": off(prediction.grad, expected),
    }


def updates() -> dict[str, dict[str, float]]:
    """Returns for each case the distances of target, in ulps, and of its copies, in bf16's, and if the source moved."""
    found = {}
    shapes = [(3, 5), (70,), (), (0, 4), (16384 + 2048 + 3,), (16384,), (1,)]
    for momentum in (1.0, 0.9999, 0.996, 0.5, 0.25, 0.0):
        for with_copies, flag, odd in ((True, None, False), (True, 0.0, True), (False, 0.0, False), (True, 2.0, False)):
            target, source, copies = lists([(n + 1,) for n in (5, 70)] if odd else shapes)
            if odd:  # addresses that allow no wide loads
                target, source, copies = ([x[1:] for x in tensors] for tensors in (target, source, copies))
            moved, kept = [x.clone() for x in target], [x.clone() for x in source]
            moved = target if odd else moved
            old, expected = [x.clone() for x in target], [x.clone() for x in target]
            stop = None if flag is None else torch.full((), flag)
            target_update(expected, source, momentum, found_nonfinite=stop, implementation="reference")
            options = {"copies": copies if with_copies else None, "found_nonfinite": stop, "implementation": "triton"}
            target_update(moved, source, momentum, table=prepare(moved, source, options["copies"]), **options)
            rounded = [x.float() for x in copies] if with_copies else [x.clone() for x in moved]
            found[f"{momentum}, copies {with_copies}, flag {flag}, odd {odd}"] = {
                "target": ulps(moved, expected, old, source),
                "copies": max(off(a, b) for a, b in zip(rounded, moved, strict=True)),
                "source kept": all(torch.equal(a, b) for a, b in zip(source, kept, strict=True)),
                "moved": max(off(a, b) for a, b in zip(moved, old, strict=True)),
            }
    return found


def update_rules() -> dict[str, str]:
    """Returns what a table of other tensors makes the update say, and that no table is needed."""
    target, source, _ = lists([(4,), (5,)])
    table = prepare(target, source)
    try:
        target_update([x.clone() for x in target], source, 0.9, table=table, implementation="triton")
        text = "ran"
    except ValueError as error:
        text = str(error)
    expected = [torch.lerp(a, b, 0.1) for a, b in zip(target, source, strict=True)]
    target_update(target, source, 0.9, implementation="triton")
    target_update([], [], 0.9, implementation="triton")
    empty, other, _ = lists([(0,)])
    target_update(empty, other, 0.9, implementation="triton")
    return {"other": text, "without": max(off(a, b) for a, b in zip(target, expected, strict=True))}


def main() -> None:
    found = {"target_loss": losses(), "target_loss rules": loss_rules()}
    found |= {"target_update": updates(), "target_update rules": update_rules()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
