"""A folder that holds, at tiny size and by the same name, everything that the commands in the documentation name."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import yaml
from pages import DOCS, blocks_of, text_of
from PIL import Image
from pyarrow import parquet
from started import TINY_PUBLISHED, Starter

from ijepa_scale.checkpoint.published_files import FILES
from ijepa_scale.models.registry import build_encoder, build_predictor

CLASSES = ("cat", "dog")
TRAIN, VAL = 12, 5  # photographs of a class: protocols need ten to train on
MODEL = "name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 2, heads: 3"
PRETRAIN = f"""
folder: runs/mine
model: {{{MODEL}, predictor_width: 24, predictor_depth: 1}}
masks: {{min_keep: 3, group_size: 4}}
data: {{train: SHARDS, batch_size: 8, workers: 0}}
schedule: {{epochs: 2, warmup_epochs: 1, steps_per_epoch: 2}}
engine: {{precision: fp32}}
logging: {{every: 1, tensorboard: false}}
checkpoint: {{every: 1, keep: 4}}
evaluate: {{every: 4, train: PHOTOS/train, test: PHOTOS/val, reader: imagefolder, batch_size: 8}}
"""  # its checkpoints are of steps 1 to 4
FINETUNE = f"""
folder: runs/finetuned
model: {{encoder: {{{MODEL}}}, num_classes: 2}}
data: {{train: PHOTOS/train, reader: imagefolder, batch_size: 8, workers: 0}}
optimizer: {{epochs: 1, warmup_epochs: 0}}
engine: {{precision: fp32}}
evaluate: {{data: PHOTOS/val, reader: imagefolder, batch_size: 8, workers: 0}}
logging: {{tensorboard: false}}
"""
PUBLISHED: dict[str, dict[str, Any]] = {
    "data": {
        "batch_size": 4, "color_jitter_strength": 0.0, "crop_scale": [0.3, 1.0], "crop_size": 56, "num_workers": 0,
        "image_folder": "PHOTOS", "root_path": "", "pin_mem": True, "use_color_distortion": False,
        "use_gaussian_blur": False, "use_horizontal_flip": False,
    },
    "logging": {"folder": "LOGS", "write_tag": "jepa"},
    "mask": {
        "allow_overlap": False, "aspect_ratio": [0.75, 1.5], "enc_mask_scale": [0.85, 1.0], "min_keep": 3,
        "num_enc_masks": 1, "num_pred_masks": 4, "patch_size": 7, "pred_mask_scale": [0.15, 0.2],
    },
    "meta": {
        "copy_data": False, "load_checkpoint": False, "model_name": "vit_tiny", "pred_depth": 1, "pred_emb_dim": 24,
        "read_checkpoint": None, "use_bfloat16": False,
    },
    "optimization": {
        "ema": [0.996, 1.0], "epochs": 1, "final_lr": 1e-6, "final_weight_decay": 0.4, "ipe_scale": 1.0, "lr": 1e-3,
        "start_lr": 2e-4, "warmup": 0, "weight_decay": 0.04,
    },
}  # fmt: skip
FORK: dict[str, dict[str, Any]] = {
    "data": {"drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25, "nb_classes": 2, "resume_epoch": 0},
    "optimization": {"label_smoothing": 0.1},
}  # fmt: skip
WRITTEN = ("runs/mine", "runs/demo", "runs/finetuned", "cache")  # by commands that don't name them
PHOTOGRAPHS = ("PHOTOS", "photos", "IMAGENET", "imagenet", "A", "F", "P")  # with train/ and val/


def build(world: Path, starter: Starter) -> Path:
    """Writes the world into a new folder, with real runs in `runs`, and returns it."""
    draw = np.random.default_rng(0)
    world.mkdir()
    for name in PHOTOGRAPHS:
        photographs(world / name, draw)
    for name, part in {"TRAIN": "train", "VAL": "val", "TEST": "val"}.items():
        shutil.copytree(world / "PHOTOS" / part, world / name)
    shutil.copytree(world / "TRAIN", world / "IMAGES")
    shutil.copytree(world / "VAL", world / "FOLDER")
    shutil.copy(world / "VAL" / "cat" / "0.jpg", world / "PHOTO.jpg")
    for name in ("shapes", "rooms"):
        for part, count in (("train", TRAIN), ("val", VAL)):
            mapped(world / name / part, draw, "masks" if name == "shapes" else "depth", count)
    ade20k(world / "ADEChallengeData2016", draw)
    (world / "DATA").mkdir()
    for number in range(4):
        np.save(world / "DATA" / f"{number}.npy", draw.integers(0, 60_000, (20, 20, 13), dtype=np.uint16))
    packed(world)
    (world / "C.yaml").write_text(PRETRAIN)
    (world / "finetune.yaml").write_text(FINETUNE)
    for name in ("published.yaml", "YOUR_PUBLISHED_FILE.yaml"):
        (world / name).write_text(yaml.safe_dump(PUBLISHED))
    fork = {name: {**values, **FORK.get(name, {})} for name, values in PUBLISHED.items()}
    (world / "fork.yaml").write_text(yaml.safe_dump(fork))
    (world / "hosts.txt").write_text("localhost slots=2\n")
    (world / "IN1K-vit.h.14-logs-rank.0.csv").write_text(
        "epoch,itr,loss,mask-A,mask-B,time (ms)\n" + "".join(f"1,{i},{1 / (i + 1):.5f},90,40,700\n" for i in range(9))
    )
    module = re.search(r"^# my_losses\.py\n.*", "".join(blocks_of(text_of(DOCS / "extending.md"))), re.M | re.S)
    assert module is not None
    (world / "my_losses.py").write_text(module[0].partition("\nPYTHONPATH=")[0])
    published(world)
    shards(world, starter)
    runs(world, starter)
    return world


def copy(world: Path, to: Path, *, named: Iterable[str], without: tuple[str, ...] = ()) -> Path:
    """Makes a world for one command: what it names is copied, all else leads to the first world; returns the folder.

    `without` is what the command is to write.
    """
    named = {*named, *WRITTEN}
    for name in without:
        assert (world / name).exists(), f"the tiny world has no {name}"

    def lay(source: Path, inside: str) -> None:
        (to / inside).mkdir()
        for each in source.iterdir():
            name = f"{inside}{each.name}"
            if name in without:
                continue
            if any(other.startswith(f"{name}/") for other in named) and name not in named:
                lay(each, f"{name}/")
            elif name not in named or each.name.endswith(".tar"):  # large, and only read
                (to / name).symlink_to(each)
            elif each.is_dir():
                shutil.copytree(each, to / name)
            else:
                shutil.copy(each, to / name)

    lay(world, "")
    return to


def listed(world: Path) -> dict[str, int]:
    """Returns when each file was written last, to tell whether a command has written into the first world."""
    return {str(path): path.stat().st_mtime_ns for path in world.rglob("*") if path.is_file()}


def picture(draw: np.random.Generator, side: int = 44) -> Image.Image:
    height, width = draw.integers(side - 6, side + 7, size=2)
    coarse = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)


def photographs(folder: Path, draw: np.random.Generator) -> None:
    for part, count in (("train", TRAIN), ("val", VAL)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                picture(draw).save(folder / part / name / f"{number}.jpg")


def packed(world: Path) -> None:
    """Writes the training photographs as a list, a CSV file, an archive of each kind, and Parquet."""
    paths = sorted((world / "PHOTOS" / "train").rglob("*.jpg"))
    (world / "photos.txt").write_text("".join(f"{path.relative_to(world)}\n" for path in paths))
    rows = "".join(f"{path.relative_to(world)},{path.parent.name}\n" for path in paths)
    (world / "labels.csv").write_text(f"path,label\n{rows}")
    for kind in ("tar", "zip"):
        shutil.make_archive(str(world / "photos"), kind, world / "PHOTOS" / "train")
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    labels = [CLASSES.index(path.parent.name) for path in paths]
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), world / "photos.parquet")


def mapped(folder: Path, draw: np.random.Generator, kind: str, count: int) -> None:
    """Writes photographs with their masks of three classes, or their depth."""
    (folder / "images").mkdir(parents=True)
    (folder / kind).mkdir()
    for number in range(count):
        image = picture(draw)
        image.save(folder / "images" / f"{number}.jpg")
        if kind == "masks":
            mask = draw.integers(0, 3, (image.height, image.width), dtype=np.uint8)
            Image.fromarray(mask).save(folder / kind / f"{number}.png")
        else:
            np.save(folder / kind / f"{number}.npy", draw.random((image.height, image.width), np.float32) + 0.5)


def ade20k(folder: Path, draw: np.random.Generator) -> None:
    for part in ("training", "validation"):
        (folder / "images" / part).mkdir(parents=True)
        (folder / "annotations" / part).mkdir(parents=True)
        for number in range(6):
            image = picture(draw)
            image.save(folder / "images" / part / f"{number}.jpg")
            mask = draw.integers(0, 151, (image.height, image.width), dtype=np.uint8)
            Image.fromarray(mask).save(folder / "annotations" / part / f"{number}.png")


def published(world: Path) -> None:
    """Writes a file in the layout of the published ones, also into the cache, where a download would put it."""
    sizes: dict[str, Any] = dict(name="vit_tiny", image_size=(112, 112), patch_size=14, **TINY_PUBLISHED)
    encoder = build_encoder(**sizes, heads=3, seed=1).state_dict()
    predictor = build_predictor(
        "vit_tiny", image_size=112, patch_size=14, width=24, depth=1, encoder_width=sizes["width"], heads=3
    ).state_dict()
    parts = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor}
    path = world / FILES["in1k_vith14_ep300"].file
    torch.save({role: {f"module.{name}": t for name, t in part.items()} for role, part in parts.items()}, path)
    os.link(path, world / "jepa.pth.tar")
    for folder in ("weights", "cache/published"):
        (world / folder).mkdir(parents=True)
        os.link(path, world / folder / path.name)


def shards(world: Path, starter: Starter) -> None:
    for part, name in (("train", "SHARDS"), ("val", "VAL_SHARDS")):
        run(
            starter, world, "shards", "make", "--root", f"PHOTOS/{part}", "--split", ".", "--to", name, "--workers", "0"
        )
    for folder in ("datasets/imagenet", "datasets/fashion-mnist", "datasets/mine"):
        shutil.copytree(world / "SHARDS", world / folder / "train")
        shutil.copytree(world / "VAL_SHARDS", world / folder / ("val" if folder.endswith("imagenet") else "test"))
    for name in ("LABELLED", "data/shards"):
        shutil.copytree(world / "SHARDS", world / name)
    shutil.copytree(world / "VAL_SHARDS", world / "HELD_OUT")
    (world / "NAMED").mkdir()
    with tarfile.open(world / "NAMED" / "0.tar", "w") as tar:  # as other tools write labels
        for name in CLASSES:
            (world / "label.cls").write_text(name)
            tar.add(world / "PHOTOS" / "val" / name / "0.jpg", f"{name}.jpg")
            tar.add(world / "label.cls", f"{name}.cls")


def runs(world: Path, starter: Starter) -> None:
    run(starter, world, "pretrain", "--config", "C.yaml")
    run(starter, world, "finetune", "--config", "finetune.yaml", "model.init=runs/mine")
    for name in ("runs/photos", "runs/first", "runs/second", "runs/demo", "RUN", "SOURCE", "runs/in1k_vitl16_ep600"):
        shutil.copytree(world / "runs" / "mine", world / name)


def run(starter: Starter, world: Path, script: str, *words: str) -> None:
    ended = starter.start(script, list(words), world, variables=VARIABLES)
    assert ended.code == 0, f"{script} {words}: {ended}"
    world.with_suffix(".log").unlink()


VARIABLES = {
    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "IJEPA_SCALE_CACHE": "cache",
}  # fmt: skip
