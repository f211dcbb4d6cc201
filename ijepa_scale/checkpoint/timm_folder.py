"""Writes a folder that timm opens: weights, `config.json`, and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.checkpoint.geometry import mlp_ratio
from ijepa_scale.checkpoint.model_card import model_card
from ijepa_scale.checkpoint.portable import Portable, write_tensors
from ijepa_scale.checkpoint.whole import write_folder
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.layers import LAYER_NORM_EPS

# (patch, width, depth, heads, MLP width) of timm's models without a class token whose sizes aren't written out.
_NAMED = {
    (14, 1280, 32, 16, 5120): "vit_huge_patch14_gap_224",
    (16, 1280, 32, 16, 5120): "vit_huge_patch16_gap_448",
    (16, 1408, 40, 16, 6144): "vit_giant_patch16_gap_224",
}
_ANY = "vit_base_patch16_gap_224"  # with all sizes written out


def export_timm(model: Portable, to: Path) -> str:
    """Writes the folder, and returns a line of Python that opens it.

    Raises:
        CheckpointError: timm has no such model, or the folder can't be written.
    """
    _refuse(model)
    config = _config(model)
    _check_names(model, config)
    arguments = "".join(f", {name}={value!r}" for name, value in config["model_args"].items())
    shape = tuple(config["pretrained_cfg"]["input_size"])
    by_file = (
        f'timm.create_model("{config["architecture"]}", pretrained=True, pretrained_cfg_overlay=dict('
        f'file="FOLDER/model.safetensors", num_classes={model.num_classes}, input_size={shape}){arguments})'
    )
    lines = ['timm.create_model("local-dir:FOLDER", pretrained=True)', by_file]

    def write(folder: Path) -> None:
        write_tensors(model.weights, model.weights.tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(model, "timm", lines), encoding="utf-8")

    write_folder(to, write)
    return lines[0].replace("FOLDER", str(to))


def _refuse(model: Portable) -> None:
    origin = model.weights.origin
    if model.classifier is not None and model.classifier.num_layers > 1:
        raise CheckpointError(
            f"{origin} pools {model.classifier.num_layers} layers (model.representation=last4), and timm's classifiers "
            "the last one; export it as onnx, torch or safetensors"
        )
    if model.norm_eps != LAYER_NORM_EPS:
        raise CheckpointError(
            f"{origin} has layer norms of eps {model.norm_eps:g}, and timm's have {LAYER_NORM_EPS:g}: features would "
            "differ; export it as transformers, onnx or torch"
        )


def _config(model: Portable) -> dict[str, Any]:
    """Returns timm's configuration. Source: `save_config_for_hf` of timm/models/_hub.py, for its keys."""
    sizes = model.sizes
    key = (sizes.patch_size, sizes.width, sizes.depth, sizes.heads, sizes.mlp_width)
    arguments: dict[str, Any] = {} if key in _NAMED else {
        "patch_size": sizes.patch_size, "embed_dim": sizes.width, "depth": sizes.depth, "num_heads": sizes.heads,
        "mlp_ratio": mlp_ratio(sizes.width, sizes.mlp_width),
    }  # fmt: skip
    if model.classifier is not None and model.classifier.pool_norm == "after":
        arguments["fc_norm"] = True
    images: dict[str, Any] = {
        "input_size": [sizes.channels, *model.image_size], "fixed_input_size": True, "interpolation": "bicubic",
        "crop_pct": model.crop_fraction, "crop_mode": "center", "mean": list(model.mean), "std": list(model.std),
        "num_classes": model.num_classes, "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    if model.weights.facts.licence is not None:
        images["license"] = model.weights.facts.licence
    if model.weights.classes is not None:
        images["label_names"] = list(model.weights.classes)
    return {
        "architecture": _NAMED.get(key, _ANY),
        "num_classes": model.num_classes,
        "num_features": sizes.width,
        "global_pool": "avg",
        "pretrained_cfg": images,
        "model_args": arguments,
    }


def _check_names(model: Portable, config: dict[str, Any]) -> None:
    """Checks names and shapes against timm's own model, built without weights."""
    import timm  # takes seconds, and is only needed here

    images = {name: value for name, value in config["pretrained_cfg"].items() if name != "label_names"}
    with torch.device("meta"):
        theirs = timm.create_model(config["architecture"], pretrained_cfg_overlay=images, **config["model_args"])
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in model.weights.tensors.items()}
    apart = sorted({*wanted.items()} ^ {*found.items()})
    if apart:
        name = apart[0][0]
        raise CheckpointError(
            f"{model.weights.origin}: {name} is {found.get(name, 'missing')}, and {wanted.get(name, 'missing')} in "
            f"timm {timm.__version__}'s {config['architecture']}; export it as safetensors, onnx or torch"
        )
