"""Runs and images for tests of pictures: a tiny checkpoint of pretraining, and photographs of two kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ijepa_scale.checkpoint import store
from ijepa_scale.config import PretrainConfig, to_yaml
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.models.registry import build_jepa

SIZES: dict[str, Any] = dict(
    name="vit_tiny", image_size=(32, 48), patch_size=8, width=24, depth=4, heads=3, predictor_width=12,
    predictor_depth=2,
)  # fmt: skip
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def write_run(folder: Path, *, masks: dict[str, Any] | None = None, checkpoint: bool = True, **data: Any) -> Path:
    """Writes a run's folder: configuration, rows, provenance and, if asked, a checkpoint; returns it."""
    drawn = {"min_keep": 1, "group_size": 8, "target_scale": (0.15, 0.3), **(masks or {})}
    config = PretrainConfig(model=SIZES, masks=drawn, data=data)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"packages": {"torch": "2.11.0"}, "device": "cpu", "processes": 1}))
    rows = [{"step": 0, "knn": 0.1, "knn_untrained": 0.1}]
    rows += [
        {"step": s, "loss": 1 / s, "lr": 1e-3, "target_std": 0.5, "images_per_s": 10.0 * s, "step_ms": 3.0, "mfu": None}
        for s in range(10, 60, 10)
    ]
    rows.append({"step": 50, "knn": 0.25, "knn_untrained": 0.1, "alarm": 1})
    for row in (rows[0], rows[-1]):
        row |= {f"grad_norm_encoder_{block}": 0.1 * (block + 1) for block in range(4)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if checkpoint:
        jepa, target = build_jepa(config.model, seed=1), build_jepa(config.model, seed=2).encoder
        tensors = {f"model.{n}": t for n, t in jepa.state_dict().items()}
        tensors |= {f"target.{n}": t for n, t in target.state_dict().items()}
        pieces = [
            Piece(name=n, tensor=t.flatten(), start=0, shape=tuple(t.shape))
            for n, t in tensors.items()
            if "pos_" not in n
        ]
        extra = json.loads(json.dumps({"config": config.values(), "kind": "pretrain"}))
        store.save(folder / "checkpoints", 50, pieces, world=ALONE, extra=extra, keep=1)
    return folder


def write_photographs(folder: Path, count: int = 8, names: tuple[str, ...] = ("stripes", "dots")) -> Path:
    """Writes `count` images of each kind, in pairs of almost equal ones; returns the folder."""
    draw = np.random.default_rng(0)
    for kind, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(0, count, 2):
            image = draw.integers(0, 200, (4, 6, 3)).repeat(12, 0).repeat(12, 1) + 50 * kind
            for copy in range(2):
                noisy = (image + draw.integers(0, 3, image.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / name / f"{number + copy:02d}.png")
    return folder


def stays_on_page(figure: Figure) -> bool:
    """Returns whether nothing that is drawn, texts above all, reaches beyond the figure's edges."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    return drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02
