"""Splits a module's parameters into groups, and applies the schedule to groups. Must not know any optimiser."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ijepa_scale.schedules import Hyper

CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."
COMPILE_PREFIX = "_orig_mod."

# Splits a module, sharded or not, into groups: dicts of `params`, `decay` (bool) and, optionally, `lr_scale`.
GroupFunction = Callable[[nn.Module], list[dict[str, Any]]]
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_PATCHES = re.compile(r"(?:^|\.)(?:patch_embed\.|pos_embed$)")
_LAST = re.compile(r"(?:^|\.)(?:norm|fc_norm|head)\.")  # norms outside blocks, and the head


def clean_name(name: str) -> str:
    """Returns a parameter's name without the prefixes of checkpointing and compilation."""
    return name.replace(CHECKPOINT_PREFIX, "").replace(COMPILE_PREFIX, "")


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the four published groups: encoder and predictor weights, then their biases and 1-D parameters.

    Weights decay; biases and 1-D parameters don't. `mask_token` is 3-D and decays. Empty groups are omitted. Each group
    has `decay` (bool), which `set_hyper` reads.

    Raises:
        ValueError: a trainable parameter belongs to neither part, or is shared under two names.

    Source: the I-JEPA paper's released code, as stated in the project's specification.
    """
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        for part in ("encoder", "predictor"):
            named = [
                (name, p)
                for name, p in _trained(module)
                if name.startswith(f"{part}.") and (p.ndim > 1 and not name.endswith(".bias")) == decay
            ]
            if named:
                groups.append(
                    {"params": [p for _, p in named], "decay": decay, "name": f"{part}{'' if decay else ' 1-D'}"}
                )
    return check_groups(module, groups)


def layer_decay_groups(module: nn.Module, *, layer_decay: float) -> list[dict[str, Any]]:
    """Returns a classifier's groups, first to last layer, with learning rates that fall from the head to the patches.

    A group's `lr_scale` is layer_decay^(depth + 1 - id), with id 0 for patch and position embedding, i + 1
    for block i, and depth + 1 for norms outside blocks and the head. `decay` is false for 1-D parameters and
    position embeddings. Frozen parameters are in no group, but frozen blocks count towards the depth.

    Raises:
        ValueError: `layer_decay` is outside (0, 1], the module has no blocks, or a trainable parameter has no layer or
            is shared under two names.

    Source: arXiv 2111.06377, appendix A.1, with its released code; the rule is from arXiv 2003.10555.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; give a number above 0 and at most 1")
    blocks = [int(found[1]) for name, _ in module.named_parameters() if (found := _BLOCK.search(clean_name(name)))]
    if not blocks:
        raise ValueError(f"{type(module).__name__} has no parameters named blocks.N; give a module with an encoder")
    depth = max(blocks) + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in _trained(module):
        layer = _layer(name, depth)
        if layer is None:
            continue
        decay = parameter.ndim > 1 and not name.endswith("pos_embed")
        empty = {"params": [], "decay": decay, "lr_scale": layer_decay ** (depth + 1 - layer)}
        group = groups.setdefault((layer, decay), {**empty, "name": f"layer {layer}{'' if decay else ' 1-D'}"})
        group["params"].append(parameter)
    return check_groups(module, [groups[key] for key in sorted(groups)])


def _layer(name: str, depth: int) -> int | None:
    """Returns the layer of a parameter, or None if it is unknown."""
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    if _PATCHES.search(name):
        return 0
    return depth + 1 if _LAST.search(name) else None


def _trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the names and parameters that require a gradient; a shared parameter once under each of its names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            yield clean_name(name), parameter


def check_groups(module: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the groups, after checking that they hold each trainable parameter of the module exactly once.

    Raises:
        ValueError: they don't. A parameter without a group would never train; one in two groups would train twice.
    """
    claims = Counter(id(parameter) for group in groups for parameter in group["params"])
    names: dict[int, str] = {}
    for name, parameter in _trained(module):
        names[id(parameter)] = f"{names[id(parameter)]} = {name}" if id(parameter) in names else name
    without = [name for key, name in names.items() if not claims[key]]
    twice = [name for key, name in names.items() if claims[key] > 1]
    if without:
        raise ValueError(
            f"no parameter group holds {', '.join(without)}, so it would never train; add it in optim/groups.py, or "
            "freeze it with requires_grad_(False)"
        )
    if twice:
        raise ValueError(
            f"parameter groups hold {', '.join(twice)} more than once, so each step would update it twice; share no "
            "parameter between modules, and put each into one group in optim/groups.py"
        )
    return groups


def set_hyper(groups: Iterable[dict[str, Any]], hyper: Hyper) -> None:
    """Sets each group's learning rate, times its `lr_scale` if any, and its weight decay, 0 unless the group decays."""
    for group in groups:
        group["lr"] = hyper.lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = hyper.weight_decay if group["decay"] else 0.0
