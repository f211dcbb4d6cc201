"""Records the results of training: losses, weights, moments and target after 20 steps, and the first 50 batches.

    python -m tests.golden.record            # writes curves.json, batches.json and the two checkpoints
    python -m tests.golden.record --only pretrain-plain

Record again only if a change is meant to change numbers, and say so in its commit. On the machine that recorded the
files, runs must equal them bit for bit; on others, losses and norms must agree within 1e-6.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ijepa_scale.checkpoint.store import Checkpoint
from ijepa_scale.config import load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.open import build_source
from ijepa_scale.engine.world import World
from ijepa_scale.masks import MaskSampler
from ijepa_scale.train.finetune import finetune
from ijepa_scale.train.pretrain import pretrain
from tests.distributed.harness import run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, BATCHES = 20, 50
KINDS = ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.", "target.")

PRETRAIN = """
seed: 3
model: {name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 2, heads: 2, predictor_width: 12,
  predictor_depth: 2}
masks: {min_keep: 3, group_size: 4}
data: {batch_size: 8, workers: 0, window_shards: 2}
augment: {flip: 0.5, color_jitter: 0.4, grayscale: 0.2, blur: 0.5, solarize: 0.2}
optimizer: {start_lr: 1e-3, lr: 4e-3, final_lr: 1e-5}
schedule: {epochs: 4, warmup_epochs: 1, steps_per_epoch: 6, momentum: [0.8, 1.0], stop_after: 20}
engine: {device: cpu, precision: fp32}
logging: {every: 1, tensorboard: false, progress: none}
checkpoint: {every: 0}
"""
FINETUNE = """
seed: 4
stop_after: 20
model: {name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 3, heads: 2, num_classes: 2, drop_path: 0.2}
data: {batch_size: 8, workers: 0, window_shards: 2}
augment: {crop_scale: [0.3, 1.0]}
optimizer: {epochs: 5, warmup_epochs: 1, lr: 2e-3, layer_decay: 0.7, ema: 0.8}
engine: {device: cpu, precision: fp32}
logging: {every: 1, tensorboard: false, progress: none}
checkpoint: {every: 0}
"""
ENGINES: dict[str, tuple[int, tuple[str, ...]]] = {
    "plain": (1, ("engine.strategy=plain",)),
    "ddp": (2, ("engine.strategy=ddp",)),
    "fsdp2": (2, ("engine.strategy=fsdp2",)),
    "zero2": (2, ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero2.json")),
    "zero3": (2, ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero3_small.json")),
}
# Settings that run under every engine (EVERYWHERE), and settings that run in one process only (PLAIN).
EVERYWHERE = {
    "pretrain": ("masks.context=truncate",),
    "pretrain-packed": ("masks.context=packed", "engine.accumulation=2"),
    "finetune": ("engine.accumulation=2", "optimizer.clip_norm=0.5"),
}
PLAIN = {
    "pretrain-bf16": ("engine.precision=bf16",),
    "pretrain-reference": ("masks.sampler=reference", "masks.group_size=8", "engine.accumulation=2"),
    "pretrain-l2": ("objective.loss=l2", "optimizer.clip_norm=1.0", "masks.num_context_blocks=2"),
    "pretrain-beta": ("objective.beta=0.1", "masks.allow_overlap=true", "engine.checkpointing=full"),
    "finetune-bf16": ("engine.precision=bf16", "model.frozen_blocks=1", "model.representation=last4", "model.depth=4"),
    "finetune-norm": ("model.pool_norm=before", "optimizer.ema=null", "augment.rand_augment=null"),
}
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    **{
        f"{setting}-{engine}": (processes, (*changes, *overrides))
        for setting, changes in EVERYWHERE.items()
        for engine, (processes, overrides) in ENGINES.items()
    },
    **{name: (1, (*changes, *ENGINES["plain"][1])) for name, changes in PLAIN.items()},
}
MASKS = {
    "multiblock": ("masks.group_size=4",),
    "multiblock-packed": ("masks.context=packed",),
    "reference": ("masks.sampler=reference", "masks.group_size=8"),
    "overlap": ("masks.allow_overlap=true", "masks.num_context_blocks=2", "masks.group_size=3"),
}


def machine() -> dict[str, str]:
    """Returns what determines the last bit of a result: the processor and the versions of torch and numpy."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "cpu family", "model\t", "stepping", "flags")
    facts = sorted({line for line in lines if line.startswith(wanted)})
    return {
        "processor": hashlib.sha256("\n".join([platform.machine(), *facts]).encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write_images(folder: Path) -> Path:
    """Writes 50 PNG images of 2 classes into shards. PNG decodes to the same pixels everywhere."""
    generator = np.random.default_rng(7)
    samples = []
    for index in range(50):
        height, width = generator.integers(30, 70, size=2)
        ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + generator.integers(0, 200, 3)
        noise = generator.integers(0, 60, (height, width, 3))
        buffer = io.BytesIO()
        Image.fromarray(((ramp + noise) % 256).astype(np.uint8)).save(buffer, "PNG")
        samples.append(Sample(key=f"{index:04d}", image=buffer.getvalue(), label=index % 2))
    write_shards(samples, folder, shard_bytes=60_000)
    return folder


def config_file(name: str, folder: Path, data: Path) -> Path:
    """Writes the YAML of a case and returns its path."""
    path = folder / f"{name}.yaml"
    text = FINETUNE if name.startswith("finetune") else PRETRAIN
    path.write_text(text.replace("data: {", f"data: {{train: {data}, ") + f"folder: {folder / name}\n")
    return path


def train(world: World, path: str, overrides: tuple[str, ...]) -> None:
    """Runs a case in this process, which is one of the case's processes."""
    if Path(path).name.startswith("finetune"):
        finetune(load_config(path, overrides, kind=FinetuneConfig), world)
    else:
        pretrain(load_config(path, overrides), world)


def tensor_hash(*tensors: Tensor) -> str:
    """Returns a hash of the tensors' dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """Returns the hash and the norm of each kind of tensor in a checkpoint."""
    full = Checkpoint(checkpoint).full("")
    assert all(name.startswith(KINDS) for name in full), sorted(full)
    found = {}
    for kind in KINDS:
        names = sorted(name for name in full if name.startswith(kind))
        tensors = [full[name] for name in names]
        norm = float(sum((t.double().square().sum() for t in tensors), torch.zeros((), dtype=torch.float64)).sqrt())
        found[kind] = {"tensors": len(names), "sha256": tensor_hash(*tensors), "norm": norm}
    return found


def curve(name: str, folder: Path, data: Path) -> dict[str, Any]:
    """Runs a case in new processes, and returns its losses, gradient norms and final state."""
    processes, overrides = CASES[name]
    run(train, processes, str(config_file(name, folder, data)), overrides, alone=processes == 1)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row.get("loss") is not None]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return {
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "state": state_of(folder / name / "checkpoints" / f"step-{STEPS:08d}"),
    }


def batches(folder: Path, data: Path) -> dict[str, Any]:
    """Returns sample ids, crop sizes and pixel hashes of the first 50 batches, and mask hashes for each setting."""
    path = config_file("batches", folder, data)
    config = load_config(path)
    source = build_source("shards", data)
    order = SampleOrder(source.shard_sizes, 8, config.seed, config.data.window_shards)
    loader = TrainLoader(source, order, config.augment, config.model.image_size, seed=config.seed, stop_step=BATCHES)
    rows = [[batch.sample_ids.tolist(), batch.sizes.tolist(), tensor_hash(batch.pixels.cpu())] for batch in loader]
    found: dict[str, Any] = {"batches": rows, "masks": {}}
    for name, overrides in MASKS.items():
        masks = load_config(path, overrides).masks
        sampler = MaskSampler(masks, config.model.grid, seed=config.seed)
        found["masks"][name] = [mask_hash(sampler(step, 0, 8, 8)) for step in range(BATCHES)]
    return found


def mask_hash(masks: Any) -> str:
    """Returns a hash of all tensors of masks, in the order of their fields."""
    tensors: dict[str, Tensor] = {}
    masks.map(lambda tensor: tensors.setdefault(str(len(tensors)), tensor))
    return tensor_hash(*tensors.values())


# Overrides of the runs of the checkpoints. Synthetic images don't depend on the library that writes PNG files.
CHECKPOINTS = {
    "pretrain": ("data.reader=synthetic", "data.train=null", "data.synthetic_samples=40"),
    "finetune": ("data.reader=synthetic", "data.train=null", "data.synthetic_samples=40", "model.num_classes=40"),
}


def write_checkpoint(name: str, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint of step 10 into this folder, and returns the losses of the next 10 steps."""
    path = config_file(name, folder, folder)
    shutil.rmtree(folder / name, ignore_errors=True)
    run(train, 1, str(path), (*CHECKPOINTS[name], "checkpoint.every=10", *ENGINES["plain"][1]), alone=True)
    kept = HERE / f"{name}-checkpoint"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder / name / "checkpoints" / "step-00000010", kept / "step-00000010")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [row["loss"] for row in rows if row["step"] > 10 and "loss" in row]}


def main() -> None:
    """Writes the files, or one case of curves.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES), action="append")
    chosen = parser.parse_args().only
    torch.set_num_threads(1)
    file = HERE / "curves.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_images(folder / "data")
        known = json.loads(file.read_text()) if chosen else {"machine": machine(), "cases": {}, "resumed": {}}
        for name in chosen or CASES:
            known["cases"][name] = curve(name, folder, data)
            print(name, known["cases"][name]["losses"][-1], flush=True)
        if not chosen:
            for name in ("pretrain", "finetune"):
                known["resumed"][name] = write_checkpoint(name, folder)
            found = {"machine": machine(), **batches(folder, data)}
            (HERE / "batches.json").write_text(json.dumps(found, indent=None, separators=(",", ":")) + "\n")
    file.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
