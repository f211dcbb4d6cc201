"""Loads weights into an encoder or classifier, and reports what was loaded.

Loading is strict: each tensor of the source is either loaded or left out for a known reason, and each parameter of the
model is either loaded or new for a known reason. Anything else is refused before the model changes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_scale.checkpoint.geometry import PATCHES, Positions, depth_of, positions_of, with_channels
from ijepa_scale.checkpoint.sources import Weights, read_weights
from ijepa_scale.data.class_names import shortened
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.classifier import Classifier
from ijepa_scale.models.layers import LayerNorm
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.plurals import counted

logger = logging.getLogger(__name__)

_SHOWN = 6  # names in a message
_CLASSIFIERS_OWN = ("fc_norm.", "head.")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The result of `load_weights`. Tensors have the names of this package; an encoder's have no prefix."""

    origin: str
    which: str  # target | context | only
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # parameters that keep their initial values
    unexpected: tuple[str, ...]  # tensors that were left out
    reshaped: tuple[str, ...]  # descriptions of what was recomputed for another size
    share: float  # the share of the model's parameters, counted in elements, that was loaded
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Returns the report in a few lines."""
        encoder = "its only encoder" if self.which == "only" else f"the {self.which} encoder"
        lines = [
            f"{self.origin}: loaded {encoder}, {len(self.loaded)} tensors, {self.share:.1%} of the model's weights"
        ]
        for title, names in (("new", self.missing), ("left out", self.unexpected), ("reshaped", self.reshaped)):
            if names:
                lines.append(f"  {title}: {listed(names)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def load_weights(
    module: VisionTransformer | Classifier,
    source: str | Path,
    *,
    which: str = "target",
    keep_head: bool = False,
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Loads the weights of `source` (see `read_weights`) into an encoder or a classifier; returns a report.

    The module mustn't be sharded yet, and changes only if everything matches. A classifier's head is loaded only with
    `keep_head`; its classes must then be `classes`, in this order, if both are known. The position embedding stays the
    module's own; the report says how it differs from the source's.

    Raises:
        CheckpointError: the source can't be read or doesn't match; the message lists all problems.
    """
    report = fit(module, read_weights(source, which=which), keep_head=keep_head, classes=classes)
    logger.log(logging.WARNING if report.notes else logging.INFO, "%s", report.text())
    return report


def fit(
    module: VisionTransformer | Classifier,
    weights: Weights,
    *,
    keep_head: bool = False,
    classes: Sequence[str] | None = None,
) -> LoadReport:
    """Loads weights that have been read into the module; see `load_weights`."""
    own = {_plain(name, module): tensor for name, tensor in module.state_dict(keep_vars=True).items()}
    found = dict(weights.tensors)
    encoder = module.encoder if isinstance(module, Classifier) else module
    problems, reshaped = _positions(weights, encoder)
    found.pop("pos_embed", None)
    own.pop("pos_embed")
    patches = found.get(PATCHES)
    if patches is not None and patches.ndim == 4 and patches.shape[1] != (channels := own[PATCHES].shape[1]):
        reshaped.append(f"{PATCHES}, {patches.shape[1]} channels -> {channels}, each the sum over them / {channels}")
        found[PATCHES] = with_channels(patches, channels)
    unexpected = [name for name in found if name not in own or (name.startswith("head.") and not keep_head)]
    missing = [name for name in own if name not in found or name in unexpected]
    loaded = [name for name in own if name not in missing]
    problems += _size_problems(found, weights, encoder, "model" if encoder is module else "model.encoder")
    if not problems:
        problems = _name_problems(module, missing, unexpected, keep_head) + _shape_problems(own, found, loaded)
        problems += [f"{n} holds values that aren't finite" for n in loaded if not found[n].isfinite().all()]
        if keep_head:
            problems += _class_problems(weights.classes, classes)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"{weights.origin} doesn't match the model, and nothing was loaded: {'; '.join(problems[:_SHOWN])}{more}"
        )
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(found[name])
    notes = weights.notes
    theirs, eps = weights.facts.norm_eps, next(m.eps for m in encoder.modules() if isinstance(m, LayerNorm))
    if theirs not in (None, eps):
        notes += (f"its layer norms have eps {theirs:g}, the model's {eps:g}: features differ a little",)
    elements = {name: tensor.numel() for name, tensor in own.items()}
    return LoadReport(
        origin=weights.origin,
        which=weights.which,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        reshaped=tuple(reshaped),
        share=sum(elements[name] for name in loaded) / sum(elements.values()),
        notes=notes,
    )


def _plain(name: str, module: VisionTransformer | Classifier) -> str:
    return name.removeprefix("encoder.") if isinstance(module, Classifier) else name


def _positions(weights: Weights, encoder: VisionTransformer) -> tuple[list[str], list[str]]:
    """Returns the problems, and how the position embedding differs from the source's."""
    tensor = weights.tensors.get("pos_embed")
    if tensor is not None and tensor.shape[-1] != encoder.width:
        return [f"pos_embed is {tensor.shape[-1]} wide, the model {encoder.width}"], []
    try:
        found = positions_of(weights)
    except CheckpointError as error:
        return [str(error).removeprefix(f"{weights.origin}: ")], []
    ours = Positions(encoder.grid, encoder.position_grid or encoder.grid)
    if found in (None, ours):
        return [], []
    assert found is not None
    how = "interpolated" if ours.computed_for == found.computed_for else "computed anew"
    (rows, columns), grid = found.grid, encoder.grid
    return [], [f"pos_embed, {rows} x {columns} patches -> {grid[0]} x {grid[1]}, {how}"]


def _size_problems(found: dict[str, Tensor], weights: Weights, encoder: VisionTransformer, section: str) -> list[str]:
    """Returns the sizes in which the models differ, each once and not for each tensor. `section` holds the model's."""
    problems = []
    patches = found.get(PATCHES)
    if patches is not None and patches.ndim == 4:
        size = tuple(patches.shape[2:])
        if size != (encoder.patch_size, encoder.patch_size):
            problems.append(
                f"its patches are {size[0]} x {size[1]} pixels, the model's {encoder.patch_size}: trained patch "
                f"embeddings aren't resized; set {section}.patch_size={size[0]}"
            )
        if len(patches) != encoder.width:
            remedy = f"set {section}.name or {section}.width"
            problems.append(f"its width is {len(patches)}, the model's {encoder.width}; {remedy}")
    depth = depth_of(found)
    if depth != len(encoder.blocks):
        problems.append(
            f"it has {counted(depth, 'block')}, the model {len(encoder.blocks)}; set {section}.name or {section}.depth"
        )
    first_block: Any = encoder.blocks[0]
    heads = first_block.attn.heads
    if weights.facts.heads not in (None, heads):
        problems.append(
            f"it has {weights.facts.heads} attention heads, the model {heads}; set {section}.name or {section}.heads"
        )
    return problems


def _name_problems(
    module: VisionTransformer | Classifier, missing: list[str], unexpected: list[str], keep_head: bool
) -> list[str]:
    """Returns the names that are missing or unexpected without a known reason."""
    new: tuple[str, ...] = ()
    left_out: tuple[str, ...] = _CLASSIFIERS_OWN
    if isinstance(module, Classifier):
        new = () if keep_head else _CLASSIFIERS_OWN
        # with a norm after pooling (fc_norm), the encoder's final norm isn't used
        left_out = ("head.", "norm.") if "fc_norm.weight" in dict(module.named_parameters()) else ("head.",)
    problems = []
    lacking = [name for name in missing if not name.startswith(new)]
    strange = [name for name in unexpected if not name.startswith(left_out)]
    if lacking:
        hint = ""
        if "norm.weight" in lacking and "fc_norm.weight" in unexpected:
            hint = " (it was finetuned with model.pool_norm=after, which has no norm before pooling)"
        elif "fc_norm.weight" in lacking:
            hint = " (model.keep_head needs the norm that the head was trained with; set model.pool_norm=before)"
        elif "head.weight" in lacking:
            hint = " (set model.keep_head=false for a new head)"
        problems.append(f"missing: {listed(lacking)}{hint}")
    if strange:
        problems.append(f"unexpected: {listed(strange)}")
    return problems


def _shape_problems(own: dict[str, Tensor], found: dict[str, Tensor], loaded: list[str]) -> list[str]:
    problems = []
    for name in loaded:
        theirs, ours = tuple(found[name].shape), tuple(own[name].shape)
        if theirs == ours or (name == "head.bias" and found["head.weight"].shape != own["head.weight"].shape):
            continue  # another number of classes is reported once, for head.weight
        if name == "head.weight" and theirs[1:] == ours[1:]:
            problems.append(
                f"its head has {counted(theirs[0], 'class')}, the model's {ours[0]}; set "
                f"model.num_classes={theirs[0]}, or "
                "model.keep_head=false for a new head"
            )
        else:
            problems.append(f"{name} is {theirs}, the model's {ours}")
    return problems


def _class_problems(theirs: Sequence[str] | None, ours: Sequence[str] | None) -> list[str]:
    """Returns a problem if the head's classes differ from the data's; their numbers are checked elsewhere."""
    if theirs is None or ours is None or len(theirs) != len(ours):
        return []
    apart = [number for number, names in enumerate(zip(theirs, ours, strict=True)) if names[0] != names[1]]
    if not apart:
        return []
    first = apart[0]
    their_name, our_name = shortened(theirs[first]), shortened(ours[first])
    return [
        f"its head's class {first} is {their_name}, the data's {our_name} ({len(apart)} of {len(ours)} differ); "
        "give data with the head's classes in its order, or model.keep_head=false for a new head"
    ]


def listed(names: tuple[str, ...] | list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
