"""Writes a folder that transformers 4 and 5 open: weights, configuration, image processor, and a model card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ijepa_scale.checkpoint.convert import to_transformers
from ijepa_scale.checkpoint.model_card import model_card
from ijepa_scale.checkpoint.portable import Portable, write_tensors
from ijepa_scale.checkpoint.whole import write_folder
from ijepa_scale.errors import CheckpointError

logger = logging.getLogger(__name__)

_BICUBIC = 3  # PIL's number of the filter


def export_transformers(model: Portable, to: Path) -> str:
    """Writes the folder, and returns a line of Python that opens it.

    Logs a warning if transformers has no image processor that makes the model's images; the folder then has none.

    Raises:
        CheckpointError: transformers has no such model, or the folder can't be written.
    """
    classifier, origin = model.classifier, model.weights.origin
    if classifier is not None and classifier.num_layers > 1:
        raise CheckpointError(
            f"{origin} pools {classifier.num_layers} layers (model.representation=last4), and transformers' "
            "IJepaForImageClassification the last one; export it as onnx, torch or safetensors"
        )
    if classifier is not None and classifier.pool_norm == "after":
        raise CheckpointError(
            f"{origin} has its norm after the pooling (model.pool_norm=after), and transformers' "
            "IJepaForImageClassification before it: logits would differ; export it as timm, onnx or torch, or finetune "
            "with model.pool_norm=before"
        )
    tensors = to_transformers(model.weights.tensors)
    name = "AutoModel"
    if classifier is not None:
        name = "AutoModelForImageClassification"
        tensors = {n if n.startswith("classifier.") else f"ijepa.{n}": tensor for n, tensor in tensors.items()}
    config, processor = _config(model), _processor(model)
    if processor is None:
        logger.warning(
            "%s: transformers has no image processor for %d channels of %s at %d x %d; preprocessor_config.json is "
            "left out, and README.md says how images are made",
            origin, model.sizes.channels, model.pixels, *model.image_size,
        )  # fmt: skip
    opens = f'transformers.{name}.from_pretrained("FOLDER")'

    def write(folder: Path) -> None:
        write_tensors(model.weights, tensors, folder / "model.safetensors")
        for file, content in (("config.json", config), ("preprocessor_config.json", processor)):
            if content is not None:
                (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(model, "transformers", [opens]), encoding="utf-8")

    write_folder(to, write)
    return opens.replace("FOLDER", str(to))


def _config(model: Portable) -> dict[str, Any]:
    """Returns the configuration of transformers' IJepaModel or IJepaForImageClassification."""
    sizes, (height, width) = model.sizes, model.image_size
    dtype = str(model.weights.tensors["patch_embed.proj.weight"].dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": ["IJepaModel" if model.classifier is None else "IJepaForImageClassification"],
        "model_type": "ijepa",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": model.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": sizes.patch_size,
        "num_channels": sizes.channels,
        "qkv_bias": True,
        "torch_dtype": dtype,
    }
    if model.classifier is not None:
        names = model.weights.classes or [f"LABEL_{number}" for number in range(model.num_classes)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config


def _processor(model: Portable) -> dict[str, Any] | None:
    """Returns the configuration of an image processor that makes the model's images; None if there is none.

    That of BiT resizes the shorter side and cuts the centre, as this package does; ViT's squeezes images to a square.
    """
    (height, width), whole = model.image_size, model.image_size[0] / model.crop_fraction
    if model.pixels != "uint8" or model.sizes.channels != 3 or height != width:
        return None
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(whole)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(model.mean),
        "image_std": list(model.std),
    }
