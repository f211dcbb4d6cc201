"""Whole runs on images that aren't 8-bit RGB: pretraining learns, resumes, is finetuned and predicts."""

from __future__ import annotations

from pathlib import Path

import torch

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.engine.world import World
from launch import shards
from tests.unit.data.deep_images import mosaic_folders

MODEL = "{name: vit_tiny, image_size: 24, patch_size: 4, width: 64, depth: 3, heads: 4"
PRETRAIN = f"""
model: {MODEL}, predictor_width: 32, predictor_depth: 2}}
masks: {{min_keep: 3, group_size: 64, sampler: reference}}
augment: {{crop_scale: [0.8, 1.0]}}
data: {{reader: imagefolder, batch_size: 64, workers: 0, pixels: uint16}}
schedule: {{epochs: 20, warmup_epochs: 2, momentum: [0.998, 1.0]}}
engine: {{device: cpu, precision: fp32, strategy: plain}}
logging: {{every: 8, tensorboard: false, progress: none}}
evaluate: {{reader: imagefolder}}
"""
FINETUNE = f"""
model: {{encoder: {MODEL}}}, num_classes: 8, drop_path: 0.0}}
augment: {{crop_scale: [0.8, 1.0], flip: 0.0, rand_augment: null, mixup: 0.0, cutmix: 0.0}}
data: {{reader: imagefolder, batch_size: 64, workers: 0, pixels: uint16}}
optimizer: {{lr: 1.0e-3, epochs: 3, warmup_epochs: 0.5}}
engine: {{device: cpu, precision: fp32, strategy: plain}}
logging: {{every: 4, tensorboard: false, progress: none}}
evaluate: {{reader: imagefolder, workers: 0}}
"""
WORLD = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def measured(root: Path, channels: int, count: int, test: int = 0, **how: float) -> Path:
    """Writes a set with ROOT/train and ROOT/test, measures it and returns it."""
    mosaic_folders(root / "train", count, channels=channels, seed=0, **how)
    if test:
        mosaic_folders(root / "test", test, channels=channels, seed=1, **how)
    options = ["--channels", str(channels), "--pixels", "uint16", "--workers", "0"]
    assert shards.main(["stats", str(root / "train"), *options]) == 0
    return root


def config(tmp_path: Path, text: str, *overrides: str, kind=PretrainConfig):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides, kind=kind)


def settings(root: Path, channels: int, folder: Path, *more: str) -> list[str]:
    return [f"data.train={root / 'train'}", f"model.channels={channels}", f"folder={folder}", *more]


def evaluated(root: Path) -> list[str]:
    return [f"evaluate.train={root / 'train'}", f"evaluate.test={root / 'test'}"]


LEARNED = {13: {"amount": 10.0, "noise": 0.5}, 1: {"amount": 6.0, "noise": 0.3}}
