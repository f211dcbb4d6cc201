"""What a source of weights says about its encoder besides the tensors. Knows nothing of tensors.

It is found in a run's configuration, in the metadata of this package's exports, and next to the weights that timm and
transformers save (`config.json`, `preprocessor_config.json`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ijepa_scale.checkpoint.published_files import licence_of
from ijepa_scale.config import ModelConfig, form
from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.finetune_run import ClassifierEvaluationConfig
from ijepa_scale.config.json_text import parse_json
from ijepa_scale.config.section import Section
from ijepa_scale.errors import CheckpointError, ConfigError

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_RESCALE = 1 / 255


class Facts(Section):
    """What tensors don't show. None: the source doesn't say."""

    image_size: tuple[form.Count, form.Count] | None = None  # height and width, pixels
    position_grid: tuple[form.Count, form.Count] | None = None  # that positions are interpolated from, if any
    heads: form.Count | None = None
    norm_eps: form.Positive | None = None  # of layer norms
    mean: tuple[float, ...] | None = None  # of each channel, in [0, 1]
    std: tuple[float, ...] | None = None
    crop_fraction: form.Fraction | None = None  # of the resized image, in evaluation
    pixels: form.PixelType | None = None  # type of the images' values
    licence: str | None = None  # of the weights, by its SPDX name in lower case

    def known(self) -> dict[str, Any]:
        """Returns what the source says, as plain values."""
        return {name: value for name, value in self.values().items() if value is not None}


def facts_of_run(config: Mapping[str, Any]) -> Facts:
    """Returns the facts in the configuration that a checkpoint of this package stores; its mapping may be partial."""
    model = config.get("model", {})
    encoder = model.get("encoder", model)  # of a classifier; earlier ones held the encoder's sizes themselves
    if not encoder:
        return Facts()
    sizes = ModelConfig(**{name: value for name, value in encoder.items() if name in ModelConfig.model_fields})
    crop = None
    if "num_classes" in model:
        evaluation = ClassifierEvaluationConfig(crop_fraction=config.get("evaluate", {}).get("crop_fraction"))
        crop = evaluation.crop_of(sizes.image_size)
    augment = config.get("augment", {})
    return Facts(
        image_size=sizes.image_size,
        position_grid=sizes.position_grid,
        heads=resolve(sizes).heads,
        mean=augment.get("mean"),
        std=augment.get("std"),
        crop_fraction=crop,
        pixels=config.get("data", {}).get("pixels"),
        licence=licence_of(str(model.get("init"))),
    )


def facts_of_folder(folder: Path) -> Facts:
    """Returns the facts in the `config.json` that timm or transformers wrote into a folder; none without one.

    Raises:
        CheckpointError: it can't be read, or says something that this package's encoder can't do.
    """
    config = _json(folder / _CONFIG)
    if isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), dict):
        return _of_timm_folder(config, folder / _CONFIG)
    if "model_type" in config:
        return facts_of_transformers(config, _json(folder / _PREPROCESSOR), str(folder / _CONFIG))
    return Facts()


def facts_of_timm(model: Any) -> Facts:
    """Returns the facts about a model that timm built."""
    blocks: Any = getattr(model, "blocks", ())
    attention = next((block.attn for block in blocks if hasattr(block, "attn")), None)
    images = getattr(model, "pretrained_cfg", {})
    return Facts(
        image_size=getattr(getattr(model, "patch_embed", None), "img_size", None),
        heads=getattr(attention, "num_heads", None),
        norm_eps=getattr(getattr(model, "norm", None), "eps", None),
        mean=_numbers(images.get("mean")),
        std=_numbers(images.get("std")),
        crop_fraction=images.get("crop_pct"),
        licence=images.get("license"),
    )


def facts_of_transformers(config: Mapping[str, Any], preprocessor: Mapping[str, Any], origin: str) -> Facts:
    """Returns the facts in the configurations of transformers' model and image processor.

    Its processor squeezes an image to a square; here the sides are cut instead, with crop fraction 1.

    Raises:
        CheckpointError: the activation isn't the exact GELU, or pixels are scaled to another range than [0, 1].
    """
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{origin}: hidden_act is {config['hidden_act']!r}; this package's encoder has gelu only")
    side = config.get("image_size")
    mean = std = crop = None
    if preprocessor:
        scale = preprocessor.get("rescale_factor", _RESCALE) if preprocessor.get("do_rescale", True) else 1.0
        if abs(scale - _RESCALE) > 1e-6:
            raise CheckpointError(f"{origin}: its images are scaled by {scale:g}; this package scales them by 1/255")
        normalises = preprocessor.get("do_normalize", True)
        mean = _numbers(preprocessor.get("image_mean")) if normalises else (0.0,) * config.get("num_channels", 3)
        std = _numbers(preprocessor.get("image_std")) if normalises else (1.0,) * config.get("num_channels", 3)
        cut, edge = preprocessor.get("crop_size"), preprocessor.get("size", {})
        resized = edge.get("shortest_edge") if isinstance(edge, Mapping) else None
        cropped = preprocessor.get("do_center_crop") and isinstance(cut, Mapping) and resized
        crop = cut["height"] / resized if cropped and isinstance(cut, Mapping) and resized else 1.0
    return Facts(
        image_size=(side, side) if isinstance(side, int) else side,
        heads=config.get("num_attention_heads"),
        norm_eps=config.get("layer_norm_eps"),
        mean=mean,
        std=std,
        crop_fraction=crop,
    )


def _of_timm_folder(config: Mapping[str, Any], path: Path) -> Facts:
    """Returns what timm says about the architecture that a configuration names, without building its weights."""
    import timm  # takes seconds, and is only needed here

    try:
        with torch.device("meta"):
            model = timm.create_model(
                config["architecture"], pretrained_cfg=config["pretrained_cfg"], **(config.get("model_args") or {})
            )
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: timm {timm.__version__} can't build its architecture ({error})") from None
    return facts_of_timm(model)


def _json(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read as JSON ({error}); download it again") from None
    return content if isinstance(content, dict) else {}


def _numbers(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


def written_facts(text: str, origin: str) -> Facts:
    """Returns the facts that `Facts.values` gave, from their JSON text.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return Facts(**parse_json(text.encode()))
    except (ConfigError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{origin}: what it says about its encoder can't be read ({error}); copy it again"
        ) from None
