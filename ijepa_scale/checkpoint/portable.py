"""What an export takes from a source: tensors, sizes, facts about the images. Writes safetensors; knows no program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ijepa_scale.checkpoint.models_of_weights import classifier_config, encoder_sizes, predictor_of_source
from ijepa_scale.checkpoint.sources import CLASSES_KEY, FACTS_KEY, WHICH_KEY, Weights, WeightsSource
from ijepa_scale.checkpoint.store import write_safetensors
from ijepa_scale.checkpoint.whole import write_file
from ijepa_scale.config.architectures import Architecture, resolve
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.data.eval_reader import IMAGENET_MEAN, IMAGENET_STD, crop_fraction_of
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.layers import LAYER_NORM_EPS
from ijepa_scale.models.pos_embed import positions


@dataclass(frozen=True, kw_only=True)
class Portable:
    """An encoder or classifier with all that another program needs to run it."""

    weights: Weights  # position embedding included
    sizes: Architecture
    classifier: ClassifierConfig | None  # its sizes, if the weights have a head
    image_size: tuple[int, int]  # height and width, pixels
    mean: tuple[float, ...]  # of each channel, in [0, 1]
    std: tuple[float, ...]
    crop_fraction: float
    pixels: str  # type of the images' values
    norm_eps: float
    digest: str  # SHA-256 of the source

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for an encoder."""
        return self.classifier.num_classes if self.classifier is not None else 0


def portable(source: WeightsSource, which: str) -> Portable:
    """Returns the target or context encoder of a source, or its classifier, with all that is known about it.

    Raises:
        CheckpointError: it isn't a model that this package has, or doesn't tell how its images are normalised.
        ConfigError: a size is needed and missing.
    """
    weights = source.encoder(which)
    sizes = resolve(ModelConfig(**encoder_sizes(weights)))
    height, width = (side * sizes.patch_size for side in sizes.grid)
    facts = weights.facts
    usual = (IMAGENET_MEAN, IMAGENET_STD) if sizes.channels == len(IMAGENET_MEAN) else (None, None)
    mean, std = facts.mean or usual[0], facts.std or usual[1]
    if mean is None or std is None or not len(mean) == len(std) == sizes.channels:
        raise CheckpointError(
            f"{weights.origin} doesn't state mean and std of its {sizes.channels} channels, which the other program "
            "needs; export a run, which knows them"
        )
    if "pos_embed" not in weights.tensors:
        computed = positions(sizes.width, sizes.grid, sizes.position_grid)[None]
        weights = replace(weights, tensors={**weights.tensors, "pos_embed": computed})
    return Portable(
        weights=weights,
        sizes=sizes,
        classifier=classifier_config(weights),
        image_size=(height, width),
        mean=tuple(mean),
        std=tuple(std),
        crop_fraction=facts.crop_fraction or crop_fraction_of((height, width)),
        pixels=facts.pixels or "uint8",
        norm_eps=facts.norm_eps or LAYER_NORM_EPS,
        digest=source.digest(),
    )


def metadata_of(weights: Weights) -> dict[str, str]:
    """Returns what a file's metadata says of its weights, as `sources` reads it."""
    metadata = {"format": "pt", **({} if weights.which == "only" else {WHICH_KEY: weights.which})}
    metadata[FACTS_KEY] = json.dumps(weights.facts.known())
    if weights.classes is not None:
        metadata[CLASSES_KEY] = json.dumps(weights.classes)
    return metadata


def write_tensors(weights: Weights, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes the tensors, which are those of `weights` under any names, with its metadata.

    Raises:
        CheckpointError: the file can't be written.
    """
    write_safetensors({n: tensor.contiguous() for n, tensor in tensors.items()}, path, metadata_of(weights))


def write_predictor(source: WeightsSource, path: Path) -> Path:
    """Writes the predictor of a source under the names of this package.

    Raises:
        CheckpointError: there is none, it doesn't match its encoder, or the file can't be written.
    """
    predictor = predictor_of_source(source)
    tensors = {name: tensor.detach().contiguous() for name, tensor in predictor.state_dict().items()}
    metadata = {"format": "pt", WHICH_KEY: "predictor"}
    return write_file(path, lambda temporary: write_safetensors(tensors, temporary, metadata))
