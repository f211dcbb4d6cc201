"""Finetuning files of the published layout's known fork, translated to ours. Mappings in, mappings out.

The fork reads the pretraining layout with a few keys more. What its code fixed (RandAugment, accumulation) isn't
in its files; what it lacked (layer-wise decay of the learning rate) stays off in a translated file, and is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ijepa_scale.config.published import FINETUNING_KEYS, flat, nest, problems_of
from ijepa_scale.errors import ConfigError

_MOVED = {
    "data.crop_scale": "augment.crop_scale",
    "data.crop_size": "model.image_size",
    "data.num_workers": "data.workers",
    "data.drop_path": "model.drop_path",
    "data.mixup": "augment.mixup",
    "data.cutmix": "augment.cutmix",
    "data.reprob": "augment.random_erasing",
    "data.nb_classes": "model.num_classes",
    "logging.folder": "folder",
    "mask.patch_size": "model.patch_size",
    "meta.model_name": "model.name",
    "optimization.epochs": "optimizer.epochs",
    "optimization.final_lr": "optimizer.min_lr",
    "optimization.label_smoothing": "augment.label_smoothing",
    "optimization.lr": "optimizer.lr",
    "optimization.warmup": "optimizer.warmup_epochs",
    "optimization.weight_decay": "optimizer.weight_decay",
}
_REQUIRED = (*_MOVED, "data.batch_size", "data.image_folder", "data.root_path", "meta.use_bfloat16")
_MASKS = "finetuning masks nothing"
_IGNORED = {
    **{f"mask.{name}": _MASKS for name in ("allow_overlap", "aspect_ratio", "enc_mask_scale", "min_keep")},
    **{f"mask.{name}": _MASKS for name in ("num_enc_masks", "num_pred_masks", "pred_mask_scale")},
    "data.color_jitter_strength": "RandAugment takes the place of colour jitter",
    "data.pin_mem": "memory is pinned wherever there is a GPU",
    "data.resume_epoch": "a run goes on from its newest checkpoint, at the very next step",
    "data.use_color_distortion": "RandAugment takes the place of colour jitter",
    "data.use_gaussian_blur": "the recipe has no blur",
    "logging.write_tag": "the files of a run have fixed names in its folder",
    "meta.copy_data": "data is read where it lies",
    "meta.pred_depth": "finetuning has no predictor",
    "meta.pred_emb_dim": "finetuning has no predictor",
    "optimization.ema": "finetuning has no target encoder",
    "optimization.final_weight_decay": "weight decay is constant",
    "optimization.ipe_scale": "the schedule is as long as the run",
    "optimization.start_lr": "the warm-up begins at 0",
}
_SWITCHES = ("data.use_horizontal_flip", "meta.load_checkpoint")
_KNOWN = (*_REQUIRED, *_IGNORED, *_SWITCHES, "meta.read_checkpoint")


def translate_finetuning(
    content: Mapping[str, Any], *, num_processes: int | None = None, origin: str = "published file"
) -> tuple[dict[str, Any], list[str]]:
    """Returns our nested mapping and notes on what was ignored or means something slightly different.

    Raises:
        ConfigError: a pretraining file, placeholders, unknown or missing keys, or switches that are neither true
            nor false; everything of a kind in one message.
    """
    settings = flat(content)
    if not any(key in settings for key in FINETUNING_KEYS):
        raise ConfigError(
            f"{origin}: has none of {', '.join(FINETUNING_KEYS)}, so it is a pretraining file; start it with "
            "launch/pretrain.py"
        )
    problems = list(problems_of(settings, known=_KNOWN, required=_REQUIRED, switches=(*_SWITCHES, "meta.use_bfloat16")))
    if problems:
        raise ConfigError("\n".join(f"{origin}: {problem}" for problem in problems))
    ours = {target: settings[key] for key, target in _MOVED.items()}
    notes = [f"{key} ignored: {why}" for key, why in _IGNORED.items() if key in settings]
    batch = ours["data.batch_size_per_process"] = settings["data.batch_size"]
    total = f", {batch * num_processes} over {num_processes} processes" if num_processes else ""
    notes.append(f"data.batch_size {batch} is per process{total}; accumulation was in the fork's code: set it yourself")
    root = "/".join([str(settings["data.root_path"]).rstrip("/"), str(settings["data.image_folder"]).strip("/")])
    ours["data.reader"] = ours["evaluate.reader"] = "imagefolder"
    ours["data.train"], ours["evaluate.data"] = f"{root}/train", f"{root}/val"
    ours["augment.flip"] = 0.5 if settings.get("data.use_horizontal_flip", True) else 0.0
    ours["engine.precision"] = "bf16" if settings["meta.use_bfloat16"] else "fp32"
    ours["optimizer.layer_decay"] = 1.0
    notes.append("optimizer.layer_decay is 1: the fork has none; 0.75 is the MAE recipe's for ViT-L and ViT-H")
    notes.append("optimization.lr is taken as it is, not scaled by the batch")
    name = settings.get("meta.read_checkpoint")
    if settings.get("meta.load_checkpoint", True) and name:
        ours["model.init"] = f"{str(settings['logging.folder']).rstrip('/')}/{name}"
        notes.append(f"meta.read_checkpoint became model.init={ours['model.init']}, its target encoder")
    else:
        notes.append("no checkpoint is loaded: model.init is null, the weights are random")
    return nest(ours), notes
