"""Reads an encoder's weights from any supported source, under the names of this package.

Sources are a run folder or checkpoint of this package (pretraining or finetuning, any engine), a published `.pth.tar`,
`.safetensors` (also in shards with an index), a PyTorch file of another program, a folder saved by transformers, or
timm's registry. Only plain tensors are read; a file that would run
code when loaded is refused. Knows nothing of the model that the weights are loaded into.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ijepa_scale.checkpoint.convert import to_ours, unwrapped
from ijepa_scale.checkpoint.file_kinds import check_kind
from ijepa_scale.checkpoint.prefixes import choose_encoder
from ijepa_scale.checkpoint.safetensors_files import INDEX, read_safetensors
from ijepa_scale.checkpoint.store import Checkpoint, newest
from ijepa_scale.checkpoint.torch_files import briefly, read_torch_file
from ijepa_scale.config import ModelConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.pos_embed import sincos_2d

TIMM = "timm:"
WHICH_KEY = "ijepa_scale.weights"  # in a safetensors file's metadata: target or context
CLASSES_KEY = "ijepa_scale.classes"  # in the same metadata: a JSON list of class names
_PUBLISHED = {"target": ("target_encoder", "teacher"), "context": ("encoder", "student")}
_INSIDE = ("state_dict", "model", "module", "model_state_dict")  # keys of a file's only model in other programs
_SUFFIXES = (".safetensors", ".tar", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """An encoder's tensors under the names of this package, possibly with a classifier's `fc_norm` and `head`."""

    tensors: dict[str, Tensor]
    origin: str  # for messages
    which: str  # target | context | only (the source holds one encoder and doesn't say which)
    heads: int | None = None  # attention heads, if the source states them; the shapes don't
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None  # class names of a finetuned head


def read_weights(source: str | Path, *, which: str = "target") -> Weights:
    """Returns the target or context encoder of `source`, on the CPU, in its stored dtype.

    For `timm:NAME`, timm downloads pretrained weights; all other sources are read from disk.

    Raises:
        CheckpointError: the source doesn't exist, is damaged or unknown, or doesn't hold the requested encoder.
    """
    if which not in _PUBLISHED:
        raise CheckpointError(f"weights is {which!r}; choose target or context")
    if str(source).startswith(TIMM):
        return _from_timm(str(source).removeprefix(TIMM), which)
    path = Path(source)
    if path.is_dir():
        checkpoint = newest(path / "checkpoints") or newest(path) or path
        if (checkpoint / "manifest.json").is_file():
            return _from_checkpoint(Checkpoint(checkpoint), which)
        index, path = path / f"model.safetensors{INDEX}", path / "model.safetensors"
        if not path.is_file() and not index.is_file():
            raise CheckpointError(
                f"{path.parent} has neither a checkpoint (checkpoints/step-XXXXXXXX, manifest.json) nor "
                "model.safetensors; give a run folder, a checkpoint, or a file"
            )
        path = path if path.is_file() else index
    if not path.is_file():
        raise CheckpointError(f"{path} doesn't exist; give a run folder, a checkpoint, a file, or {TIMM}NAME")
    if path.name.endswith(f".safetensors{INDEX}"):
        return _from_safetensors(path, which)
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(f"{path} ends in {path.suffix!r}; give a folder or one of {', '.join(_SUFFIXES)}")
    check_kind(path)
    return _from_safetensors(path, which) if path.suffix == ".safetensors" else _from_torch_file(path, which)


def _from_checkpoint(checkpoint: Checkpoint, which: str) -> Weights:
    model = checkpoint.extra.get("config", {}).get("model", {})
    model = model.get("encoder", model)  # of a classifier; earlier ones held the encoder's sizes themselves
    notes: tuple[str, ...] = ()
    classes = checkpoint.extra.get("classes")
    if "target.head.weight" in checkpoint.tensors:  # a finetuned classifier, and the average of its weights
        tensors, _ = to_ours(checkpoint.full({"target": "target.", "context": "model."}[which]), str(checkpoint.path))
    elif "model.head.weight" in checkpoint.tensors:  # a finetuned classifier with a single encoder
        tensors, _ = to_ours(checkpoint.full("model."), str(checkpoint.path))
        notes = (f"a finetuned classifier, which has one encoder: there are no separate {which} weights",)
        which = "only"
    else:
        tensors = checkpoint.full({"target": "target.", "context": "model.encoder."}[which])
    heads = None
    if model:
        sizes = resolve(ModelConfig(**{n: value for n, value in model.items() if n in ModelConfig.model_fields}))
        heads = sizes.heads
        tensors["pos_embed"] = sincos_2d(sizes.width, sizes.grid)[None]  # computed from the grid, not stored
    return Weights(
        tensors=tensors,
        origin=str(checkpoint.path),
        which=which,
        heads=heads,
        notes=notes,
        classes=tuple(classes) if classes else None,
    )


def _from_torch_file(path: Path, which: str) -> Weights:
    content = read_torch_file(path)
    found = {name: key for name, keys in _PUBLISHED.items() for key in keys if isinstance(content.get(key), Mapping)}
    if found and which not in found:
        (held,) = found
        raise CheckpointError(
            f"{path} holds only the {held} encoder, but {which} is requested; set model.weights={held}"
        )
    if found:
        key = found[which]
        return _one_of(_tensors(content[key]), f"{path} ({key})", which, stated=which)
    inside = next((content[key] for key in _INSIDE if isinstance(content.get(key), Mapping)), content)
    return _one_of(_tensors(inside), str(path), which)


def _from_safetensors(path: Path, which: str) -> Weights:
    tensors, metadata = read_safetensors(path)
    stored, named = metadata.get(WHICH_KEY), metadata.get(CLASSES_KEY)
    try:
        classes = None if named is None else tuple(str(name) for name in json.loads(named))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its class names can't be read ({briefly(error)}); copy it again") from None
    if stored in _PUBLISHED and stored != which:
        raise CheckpointError(
            f"{path} holds only the {stored} encoder, but {which} is requested; set model.weights={stored}"
        )
    weights = _one_of(tensors, str(path), which, stated=which if stored == which else None)
    return dataclasses.replace(weights, classes=classes)


def _from_timm(name: str, which: str) -> Weights:
    import timm  # takes seconds, and is only needed here

    known = timm.is_model(name.partition(".")[0])
    if not known or not getattr(timm.get_pretrained_cfg(name), "has_weights", False):
        available = ", ".join(timm.list_models("*ijepa*", pretrained=True))
        raise CheckpointError(f"timm {timm.__version__} has no weights of {name!r}; those of I-JEPA are {available}")
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError) as error:  # no network, no such weights
        raise CheckpointError(
            f"timm can't download the weights of {name} ({error}); download them on another machine and give the file"
        ) from error
    blocks: Any = model.blocks if hasattr(model, "blocks") else ()
    heads = next((block.attn.num_heads for block in blocks if hasattr(block, "attn")), None)
    weights = _one_of(dict(model.state_dict()), f"{TIMM}{name}", which)
    return Weights(**{**vars(weights), "heads": heads})


def _one_of(tensors: Mapping[str, Tensor], origin: str, which: str, *, stated: str | None = None) -> Weights:
    """Returns the encoder that is asked for. Where neither `stated` nor a name says which it is, a note says so."""
    chosen = choose_encoder(unwrapped(tensors, origin), which, origin)
    ours, naming = to_ours(chosen.tensors, origin)
    stated = stated or chosen.which
    notes = []
    if stated is None:
        notes.append(f"holds one encoder and doesn't say which; {which} was requested")
        if naming == "transformers" or origin.startswith(TIMM):
            notes[0] += ". timm's and transformers' converters use the context encoder; the paper evaluates the target"
    if chosen.left_out:
        shown = ", ".join(chosen.left_out[:3]) + (", ..." if len(chosen.left_out) > 3 else "")
        notes.append(f"{len(chosen.left_out)} tensors outside the encoder are left out: {shown}")
    return Weights(tensors=ours, origin=origin, which=stated or "only", notes=tuple(notes))


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
