"""Pretraining files of the published layout, translated to ours. Mappings in, mappings out.

The layout has the sections data, logging, mask, meta and optimization. It has no seed: the published
program seeds every process with 0, so that all of them draw the same crops and masks; here `seed: 0`
gives every sample its own draws. Every key is translated or listed as ignored, with why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ijepa_scale.config.nearest import nearest_dotted
from ijepa_scale.errors import ConfigError

_MARKS = ("mask", "meta", "optimization")
_OWN_SECTIONS = frozenset(
    "base folder seed resume model masks augment objective optimizer schedule engine checkpoint evaluate".split()
)
_PLACEHOLDER = "$"  # $replace_this_with_..., as in the published files

# Keys whose value moves to one of our keys unchanged.
_MOVED = {
    "data.crop_scale": "augment.crop_scale",
    "data.crop_size": "model.image_size",
    "data.num_workers": "data.workers",
    "logging.folder": "folder",
    "mask.allow_overlap": "masks.allow_overlap",
    "mask.aspect_ratio": "masks.target_aspect",
    "mask.enc_mask_scale": "masks.context_scale",
    "mask.min_keep": "masks.min_keep",
    "mask.num_enc_masks": "masks.num_context_blocks",
    "mask.num_pred_masks": "masks.num_target_blocks",
    "mask.patch_size": "model.patch_size",
    "mask.pred_mask_scale": "masks.target_scale",
    "meta.model_name": "model.name",
    "meta.pred_depth": "model.predictor_depth",
    "meta.pred_emb_dim": "model.predictor_width",
    "optimization.ema": "schedule.momentum",
    "optimization.epochs": "schedule.epochs",
    "optimization.final_lr": "optimizer.final_lr",
    "optimization.final_weight_decay": "optimizer.final_weight_decay",
    "optimization.ipe_scale": "schedule.ipe_scale",
    "optimization.lr": "optimizer.lr",
    "optimization.start_lr": "optimizer.start_lr",
    "optimization.warmup": "schedule.warmup_epochs",
    "optimization.weight_decay": "optimizer.weight_decay",
}
# Keys that are true or false and become something else.
_SWITCHES = (
    "data.use_color_distortion",
    "data.use_gaussian_blur",
    "data.use_horizontal_flip",
    "meta.load_checkpoint",
    "meta.use_bfloat16",
)
_OTHERS = ("data.batch_size", "data.image_folder", "data.root_path")
# Keys that may be left out: ignored, or read only beside a switch.
_IGNORED = {
    "data.pin_mem": "memory is pinned wherever there is a GPU",
    "logging.write_tag": "the files of a run have fixed names in its folder",
    "meta.copy_data": "data is read where it lies",
}
_OPTIONAL = ("data.color_jitter_strength", "meta.read_checkpoint")
_REQUIRED = (*_MOVED, *_SWITCHES, *_OTHERS)
_KNOWN = (*_REQUIRED, *_IGNORED, *_OPTIONAL)
FINETUNING_KEYS = (
    *(f"data.{name}" for name in ("drop_path", "mixup", "cutmix", "reprob", "nb_classes", "resume_epoch")),
    "optimization.label_smoothing",
)


def is_published(content: Mapping[str, Any]) -> bool:
    """Returns whether a file's content has the published layout: its sections and none of ours."""
    return sum(name in content for name in _MARKS) >= 2 and not _OWN_SECTIONS & content.keys()


def translate(
    content: Mapping[str, Any], *, num_processes: int | None = None, origin: str = "published file"
) -> tuple[dict[str, Any], list[str]]:
    """Returns our nested mapping and notes on what was ignored or means something slightly different.

    The result reproduces the published draws: reference mask sampler, context cut to the shortest of
    `data.batch_size` images. `num_processes`, where known, puts the global batch into the notes.

    Raises:
        ConfigError: A finetuning file, placeholders, unknown or missing keys, or switches that are
            neither true nor false; everything of a kind in one message.
    """
    settings = flat(content)
    finetuning = [key for key in FINETUNING_KEYS if key in settings]
    if finetuning:
        raise ConfigError(
            f"{origin}: {', '.join(finetuning)} belong to a finetuning file; pretraining can't use it: "
            "start it with launch/finetune.py"
        )
    problems = list(problems_of(settings, known=_KNOWN, required=_REQUIRED, switches=_SWITCHES))
    if problems:
        raise ConfigError("\n".join(f"{origin}: {problem}" for problem in problems))
    ours = {target: settings[key] for key, target in _MOVED.items()}
    notes = [f"{key} ignored: {why}" for key, why in _IGNORED.items() if key in settings]
    notes += _translate_data(settings, ours, num_processes)
    notes += _translate_meta(settings, ours)
    notes.append("seed: a published file has none; seed 0 is used, and every sample gets its own crop and masks")
    return nest(ours), notes


def _translate_data(settings: Mapping[str, Any], ours: dict[str, Any], num_processes: int | None) -> list[str]:
    """Adds what the data section becomes to `ours` and returns notes."""
    batch = settings["data.batch_size"]
    ours["data.batch_size_per_process"] = ours["masks.group_size"] = batch
    ours["data.reader"] = "imagefolder"
    ours["data.train"] = "/".join(
        [str(settings["data.root_path"]).rstrip("/"), str(settings["data.image_folder"]).strip("/"), "train"]
    )
    ours["masks.sampler"], ours["masks.context"] = "reference", "truncate"
    ours["augment.flip"] = 0.5 if settings["data.use_horizontal_flip"] else 0.0
    ours["augment.blur"] = 0.5 if settings["data.use_gaussian_blur"] else 0.0
    total = f", {batch * num_processes} over {num_processes} processes" if num_processes else ""
    notes = [f"data.batch_size {batch} is per process{total}; it is also the group that shares a mask size and cut"]
    if settings["data.use_color_distortion"]:
        ours["augment.color_jitter"] = settings.get("data.color_jitter_strength", 1.0)
        ours["augment.color_jitter_probability"], ours["augment.grayscale"] = 0.8, 0.2
    else:
        ours["augment.color_jitter"] = ours["augment.grayscale"] = 0.0
        if settings.get("data.color_jitter_strength"):
            notes.append("data.color_jitter_strength ignored: data.use_color_distortion is false")
    return notes


def _translate_meta(settings: Mapping[str, Any], ours: dict[str, Any]) -> list[str]:
    """Adds what the meta section becomes to `ours` and returns notes."""
    ours["engine.precision"] = "bf16" if settings["meta.use_bfloat16"] else "fp32"
    name = settings.get("meta.read_checkpoint")
    if not settings["meta.load_checkpoint"]:
        ours["resume"] = "none"
        return [f"meta.read_checkpoint {name} ignored: meta.load_checkpoint is false"] if name else []
    if name:
        ours["resume"] = f"{str(settings['logging.folder']).rstrip('/')}/{name}"
        return [f"meta.read_checkpoint became resume={ours['resume']}"]
    ours["resume"] = "auto"
    return ["meta.load_checkpoint became resume=auto: the newest checkpoint in the folder, or a start where none is"]


def problems_of(
    settings: Mapping[str, Any], *, known: Collection[str], required: Collection[str], switches: Collection[str]
) -> Iterator[str]:
    """Yields what is wrong with the keys of a published file."""
    for key, value in settings.items():
        if key not in known:
            near = nearest_dotted(key, known)
            yield f"{key}: unknown in the published layout" + (f"; did you mean {near}?" if near else "")
        elif isinstance(value, str) and value.strip().startswith(_PLACEHOLDER):
            yield f"{key} is still the placeholder {value!r}; write your own value"
    missing = [key for key in required if key not in settings]
    if missing:
        yield f"missing: {', '.join(missing)}; the published layout has them all"
    for key in (key for key in required if key in settings and key != "meta.pred_depth"):
        if settings[key] is None:
            yield f"{key} is null; write a value"
    for key in (key for key in switches if settings.get(key) is not None):
        if not isinstance(settings[key], bool):
            yield f"{key} is {settings[key]!r}; give true or false"
    batch = settings.get("data.batch_size", 1)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
        yield f"data.batch_size is {batch!r}; give the images per process, a whole number"


def flat(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the two levels that the published layout has, with dotted keys."""
    return dict(_leaves(content))


def _leaves(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys of the two levels that the published layout has."""
    for section, values in content.items():
        if isinstance(values, Mapping):
            yield from ((f"{section}.{key}", value) for key, value in values.items())
        elif values is not None:
            yield str(section), values


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted settings as nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
