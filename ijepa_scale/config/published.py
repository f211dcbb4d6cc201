"""Files of the published layout, pretraining's and those of its known finetuning fork, translated to ours.

The layout has the sections data, logging, mask, meta and optimization, and no seed: the published program seeds every
process with 0, so that all of them draw the same crops and masks; here `seed: 0` gives every sample its own draws. What
the fork's code fixed (RandAugment, accumulation) isn't in its files; what it lacked (layer-wise decay of the learning
rate) stays off. Every key is translated or listed as ignored, with why. Mappings in, mappings out.
"""

from __future__ import annotations

import os.path
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ijepa_scale.config.yaml_text import flat, nest
from ijepa_scale.errors import ConfigError
from ijepa_scale.nearest import nearest_dotted

_MARKS = ("mask", "meta", "optimization")
_OWN_SECTIONS = frozenset(
    "base folder seed resume model masks augment objective optimizer schedule engine checkpoint evaluate".split()
)
_FILES = (".tar", ".pth", ".pt")  # of the published program; a checkpoint of this package is a folder
_PLACEHOLDER = "$"  # $replace_this_with_..., as in the published files

# Keys whose value moves to one of our keys unchanged.
_MOVED = {"data.num_workers": "data.workers", "logging.folder": "folder"}
_PRETRAINING = {
    **_MOVED, "data.crop_scale": "augment.crop_scale", "data.crop_size": "model.image_size",
    "mask.patch_size": "model.patch_size", "mask.aspect_ratio": "masks.target_aspect",
    "mask.allow_overlap": "masks.allow_overlap",
    "mask.enc_mask_scale": "masks.context_scale", "mask.min_keep": "masks.min_keep",
    "mask.num_enc_masks": "masks.num_context_blocks", "mask.num_pred_masks": "masks.num_target_blocks",
    "mask.pred_mask_scale": "masks.target_scale", "meta.model_name": "model.name",
    "meta.pred_depth": "model.predictor_depth", "meta.pred_emb_dim": "model.predictor_width",
    "optimization.ema": "schedule.momentum", "optimization.epochs": "schedule.epochs",
    "optimization.final_lr": "optimizer.final_lr", "optimization.final_weight_decay": "optimizer.final_weight_decay",
    "optimization.ipe_scale": "schedule.ipe_scale", "optimization.lr": "optimizer.lr",
    "optimization.start_lr": "optimizer.start_lr", "optimization.warmup": "schedule.warmup_epochs",
    "optimization.weight_decay": "optimizer.weight_decay",
}  # fmt: skip
_FINETUNING = {
    **_MOVED, "data.crop_size": "model.encoder.image_size", "mask.patch_size": "model.encoder.patch_size",
    "data.drop_path": "model.drop_path", "data.mixup": "augment.mixup", "data.cutmix": "augment.cutmix",
    "data.reprob": "augment.random_erasing", "data.nb_classes": "model.num_classes",
    "meta.model_name": "model.encoder.name", "optimization.epochs": "schedule.epochs",
    "optimization.final_lr": "optimizer.min_lr", "optimization.label_smoothing": "augment.label_smoothing",
    "optimization.lr": "optimizer.lr", "optimization.warmup": "schedule.warmup_epochs",
    "optimization.weight_decay": "optimizer.weight_decay",
}  # fmt: skip
_REQUIRED = ("data.batch_size", "data.image_folder", "data.root_path", "meta.use_bfloat16")
_PATHS = ("data.image_folder", "data.root_path", "logging.folder")
# Keys that are true or false and become something else.
_SWITCHES = (
    "data.use_color_distortion", "data.use_gaussian_blur", "data.use_horizontal_flip", "meta.load_checkpoint",
    "meta.use_bfloat16",
)  # fmt: skip
# Keys that may be left out: ignored, or read only with a switch.
_IGNORED = {
    "data.pin_mem": "memory is pinned wherever there is a GPU",
    "meta.checkpoint_file": "the published code doesn't read it; meta.read_checkpoint names a checkpoint",
    "logging.write_tag": "the files of a run have fixed names in its folder",
    "meta.copy_data": "data is read where it lies",
}
_IGNORED_FINETUNING = {
    **_IGNORED,
    **{key: "finetuning masks nothing" for key in _PRETRAINING if key[:5] == "mask." and key not in _FINETUNING},
    **{f"data.{name}": "RandAugment takes the place of colour jitter" for name in
       ("color_jitter_strength", "use_color_distortion")},
    "data.resume_epoch": "a run goes on from its newest checkpoint, at the very next step",
    "data.use_gaussian_blur": "the recipe has no blur",
    "meta.pred_depth": "finetuning has no predictor",
    "meta.pred_emb_dim": "finetuning has no predictor",
    "optimization.ema": "finetuning has no target encoder",
    "optimization.ipe_scale": "the schedule is as long as the run",
}  # fmt: skip
# Read in `_finetuning`, with notes on what the fork's code does.
_NOTED_FINETUNING = (
    "data.crop_scale", "data.use_horizontal_flip", "optimization.final_weight_decay", "optimization.start_lr",
)  # fmt: skip
_FORKS_CROPS, _FORKS_FLIP = (0.08, 1.0), 0.5  # timm's defaults, which the fork's transform leaves
_FORKS = (  # keys that only finetuning files have
    "data.drop_path", "data.mixup", "data.cutmix", "data.reprob", "data.nb_classes", "data.resume_epoch",
    "optimization.label_smoothing",
)  # fmt: skip


def is_published(content: Mapping[str, Any]) -> bool:
    """Returns whether a file's content has the published layout: its sections and none of ours."""
    return sum(name in content for name in _MARKS) >= 2 and not _OWN_SECTIONS & content.keys()


def translate(
    content: Mapping[str, Any],
    *,
    finetuning: bool = False,
    num_processes: int | None = None,
    needs_paths: bool = True,
    origin: str = "published file",
) -> tuple[dict[str, Any], list[str]]:
    """Returns our nested mapping and notes on what was ignored or means something slightly different.

    Of a pretraining file the result reproduces the published draws: reference mask sampler, context cut to the
    shortest of `data.batch_size` images. `num_processes`, where known, puts the global batch into the notes.
    Without `needs_paths`, paths may still be placeholders.

    Raises:
        ConfigError: A file of the other kind, placeholders, unknown or missing keys, or switches that are neither
            true nor false; everything of a kind in one message.
    """
    settings = {key: value for key, value in flat(content).items() if "." in key or value is not None}
    forks = [key for key in _FORKS if key in settings]
    loads = settings.get("meta.load_checkpoint") is True and not settings.get("meta.read_checkpoint")
    if forks and not finetuning:
        raise ConfigError(
            f"{origin}: {', '.join(forks)} belong to a finetuning file; pretraining can't use it: "
            "start it with launch/finetune.py"
        )
    if finetuning and not forks:
        raise ConfigError(
            f"{origin}: has none of {', '.join(_FORKS)}, so it is a pretraining file; start it with launch/pretrain.py"
        )
    moved, ignored = (_FINETUNING, _IGNORED_FINETUNING) if finetuning else (_PRETRAINING, _IGNORED)
    required = {*moved, *_REQUIRED, *(() if finetuning else _SWITCHES)}
    optional = {
        *ignored,
        *_SWITCHES,
        *(_NOTED_FINETUNING if finetuning else ()),
        "data.color_jitter_strength",
        "meta.read_checkpoint",
    }
    switches = [key for key in _SWITCHES if key in required or key not in ignored]
    if finetuning and loads:
        raise ConfigError(
            f"{origin}: meta.load_checkpoint is true but meta.read_checkpoint names no file, for which the fork loads "
            "a fixed one; name the file to start from, or set meta.load_checkpoint to false for random weights"
        )
    if not needs_paths:
        settings = {key: value for key, value in settings.items() if key not in _PATHS} | {
            key: str(settings[key]).replace(_PLACEHOLDER, "") for key in _PATHS if settings.get(key) is not None
        }
    problems = list(_problems(settings, required=required, optional=optional, switches=switches))
    if problems:
        raise ConfigError(*(f"{origin}: {problem}" for problem in problems))
    ours = {target: settings[key] for key, target in moved.items()}
    notes = [f"{key} ignored: {why}" for key, why in ignored.items() if key in settings]
    batch = ours["data.batch_size_per_process"] = settings["data.batch_size"]
    total = f", {batch * num_processes} over {num_processes} processes" if num_processes else ""
    said = (
        "accumulation was in the fork's code: set it yourself"
        if finetuning
        else "it is also the group that shares a mask size and cut"
    )
    notes.append(f"data.batch_size {batch} is per process{total}; {said}")
    root = str(settings["data.image_folder"]).rstrip("/")
    if not finetuning:
        root = os.path.join(str(settings["data.root_path"]), root)  # as the published code does
    ours["data.reader"], ours["data.train"] = "imagefolder", os.path.join(root, "train")
    ours["engine.precision"] = "bf16" if settings["meta.use_bfloat16"] else "fp32"
    notes += _finetuning(settings, ours, root) if finetuning else _pretraining(settings, ours, batch)
    return nest(ours), notes


def _pretraining(settings: Mapping[str, Any], ours: dict[str, Any], batch: int) -> Iterator[str]:
    """Adds what only a pretraining file says to `ours` and yields notes."""
    ours["masks.sampler"], ours["masks.context"], ours["masks.group_size"] = "reference", "truncate", batch
    ours["augment.flip"] = 0.5 if settings["data.use_horizontal_flip"] else 0.0
    ours["augment.blur"] = 0.5 if settings["data.use_gaussian_blur"] else 0.0
    ours["augment.color_jitter"] = ours["augment.grayscale"] = 0.0
    if settings["data.use_color_distortion"]:
        ours["augment.color_jitter"] = settings.get("data.color_jitter_strength", 1.0)
        ours["augment.color_jitter_probability"], ours["augment.grayscale"] = 0.8, 0.2
    elif settings.get("data.color_jitter_strength"):
        yield "data.color_jitter_strength ignored: data.use_color_distortion is false"
    name, ours["resume"] = settings.get("meta.read_checkpoint"), "none"
    if not settings["meta.load_checkpoint"] and name:
        yield f"meta.read_checkpoint {name} ignored: meta.load_checkpoint is false"
    elif settings["meta.load_checkpoint"] and name:
        path = f"{str(settings['logging.folder']).rstrip('/')}/{name}"
        if str(name).lower().endswith(_FILES):
            ours |= {"resume": "auto", "model.init": path, "model.init_state": "training"}
            yield (
                f"meta.read_checkpoint became model.init={path} with model.init_state=training: weights, optimiser and "
                "epoch of that file, unless the folder has a newer checkpoint of this package"
            )
        else:
            ours["resume"] = path
            yield f"meta.read_checkpoint became resume={path}"
    elif settings["meta.load_checkpoint"]:
        ours["resume"] = "auto"
        yield "meta.load_checkpoint became resume=auto: the newest checkpoint in the folder, or a start where none is"
    yield "seed: a published file has none; seed 0 is used, and every sample gets its own crop and masks"


def _finetuning(settings: Mapping[str, Any], ours: dict[str, Any], root: str) -> Iterator[str]:
    """Adds what only a finetuning file says to `ours` and yields notes."""
    ours["evaluate.reader"], ours["evaluate.test"] = "imagefolder", os.path.join(root, "val")
    ours["optimizer.layer_decay"] = 1.0
    yield "optimizer.layer_decay is 1: the fork has none; 0.75 is the MAE recipe's for ViT-L and ViT-H"
    yield "optimization.lr is taken as it is, not scaled by the batch"
    yield f"data.root_path ignored: the fork reads data.image_folder alone, so data.train={ours['data.train']}"
    ours["augment.crop_scale"], ours["augment.flip"] = list(_FORKS_CROPS), _FORKS_FLIP
    for key, target in (("data.crop_scale", "augment.crop_scale"), ("data.use_horizontal_flip", "augment.flip")):
        if key in settings:
            yield f"{key} ignored, as by the fork: {target} is {ours[target]}, as in its code"
    decay, final = settings["optimization.weight_decay"], settings.get("optimization.final_weight_decay")
    if final not in (None, decay):
        yield f"optimization.final_weight_decay ignored: the fork ramps {decay} to {final}, here it stays at {decay}"
    if settings.get("optimization.start_lr"):
        yield f"optimization.start_lr ignored: the fork warms up from {settings['optimization.start_lr']}, here from 0"
    name = settings.get("meta.read_checkpoint")
    if settings.get("meta.load_checkpoint", name is not None) and name:
        ours["model.init"] = os.path.join(str(settings["logging.folder"]), str(name))
        yield f"meta.read_checkpoint became model.init={ours['model.init']}, its target encoder"
    else:
        yield "no checkpoint is loaded: model.init is null, the weights are random"


def _problems(
    settings: Mapping[str, Any], *, required: Collection[str], optional: Collection[str], switches: Collection[str]
) -> Iterator[str]:
    """Yields what is wrong with the keys of a published file."""
    known = sorted({*required, *optional})
    for key, value in settings.items():
        if key not in known:
            near = nearest_dotted(key, known)
            yield f"{key}: unknown in the published layout" + (f"; did you mean {near}?" if near else "")
        elif isinstance(value, str) and value.strip().startswith(_PLACEHOLDER):
            yield f"{key} is still the placeholder {value!r}; write your own value"
    missing = sorted(key for key in required if key not in settings)
    if missing:
        yield f"missing: {', '.join(missing)}; the published layout has them all"
    for key in sorted(key for key in required if key in settings and key != "meta.pred_depth"):
        if settings[key] is None:
            yield f"{key} is null; write a value"
    for key in (key for key in switches if settings.get(key) is not None):
        if not isinstance(settings[key], bool):
            yield f"{key} is {settings[key]!r}; give true or false"
    batch = settings.get("data.batch_size", 1)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
        yield f"data.batch_size is {batch!r}; give the images per process, a whole number"
