"""Runs to export, and how results are compared."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.models_of_weights import classifier_config, classifier_of_weights
from ijepa_scale.checkpoint.sources import read_weights
from ijepa_scale.config import ModelConfig, PretrainConfig
from ijepa_scale.config.finetune_run import ClassifierConfig, FinetuneConfig
from ijepa_scale.config.schema import EncoderConfig
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.models.classifier import build_classifier
from ijepa_scale.models.registry import build_jepa

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SMALL = dict(name="vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=2, heads=3)
SIZES = {
    "huge": dict(name="vit_huge", image_size=(56, 56), patch_size=14, depth=1),
    "giant": dict(name="vit_giant", image_size=(32, 32), patch_size=16, depth=1),
    "giant's ratio": dict(SMALL, width=88, heads=4, mlp_ratio=48 / 11),
    "4 channels": dict(SMALL, channels=4),
    "interpolated": dict(SMALL, position_grid=(8, 8)),
    "not square": dict(SMALL, image_size=(32, 48)),
}
NORMALISATION = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7, 0.8]}


def shaken(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Returns the parameters, none of which is trivial; their scale is that of the initial ones."""
    draw = torch.Generator().manual_seed(seed)
    return {name: p.detach() + 0.02 * torch.randn(p.shape, generator=draw) for name, p in module.named_parameters()}


def save(folder: Path, state: dict[str, Tensor], config: dict, **extra) -> Path:
    pieces = [Piece(name=n, tensor=t.flatten(), start=0, shape=tuple(t.shape)) for n, t in state.items()]
    extra = {"config": json.loads(json.dumps(config)), "identity": {"batch size of all processes": 8}, **extra}
    store.save(folder / "checkpoints", 3, pieces, world=ALONE, extra=extra, keep=1)
    return folder


def pretrained(folder: Path, **sizes) -> Path:
    model = ModelConfig(**{"predictor_width": 48, "predictor_depth": 1, **sizes})
    jepa = build_jepa(model, seed=1)
    state = {f"model.{name}": tensor for name, tensor in shaken(jepa, 2).items()}
    state |= {f"target.{name}": tensor for name, tensor in shaken(jepa.encoder, 3).items()}
    images = {name: values[: model.channels] for name, values in NORMALISATION.items()}
    data = {"pixels": "uint16" if model.channels != 3 else "uint8"}
    return save(folder, state, PretrainConfig(model=model).values() | {"augment": images, "data": data})


def finetuned(folder: Path, classes: tuple[str, ...] | None = ("cat", "dog", "newt"), **settings) -> Path:
    model = ClassifierConfig(encoder=EncoderConfig(**dict(SMALL, depth=4)), num_classes=3, **settings)
    state = {f"model.{name}": tensor for name, tensor in shaken(build_classifier(model), 4).items()}
    return save(folder, state, FinetuneConfig(model=model).values(), classes=classes)


def images_for(encoder: torch.nn.Module, count: int = 2) -> Tensor:
    side = [length * encoder.patch_size for length in encoder.grid]
    return torch.randn(count, encoder.channels, *side, generator=torch.Generator().manual_seed(5))


def logits_of(source: Path, images: Tensor) -> Tensor:
    weights = read_weights(source)
    config = classifier_config(weights)
    assert config is not None
    return classifier_of_weights(weights, config)(images)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().abs().max()) <= tolerance
