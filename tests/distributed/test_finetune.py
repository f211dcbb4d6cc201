"""Finetuning runs: accumulation equals the large batch, all launchers train the same, and killed runs resume."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_scale import environment
from ijepa_scale.config import load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.engine.world import World
from ijepa_scale.train.finetune import FinetuneTask
from tests.distributed.commands import ROOT, ZERO3, final_hashes, finish, losses, rows, start, write_data
from tests.distributed.harness import run
from tests.distributed.training import full_state

CONFIG = """
folder: {folder}
model:
  encoder: {{name: vit_tiny, image_size: 32, patch_size: 4, width: 48, depth: 3, heads: 3}}
  num_classes: 2
  drop_path: 0.2
data: {{train: {data}, batch_size: {batch}, workers: 0}}
augment: {{crop_scale: [0.3, 1.0]}}
schedule: {{epochs: {epochs}, warmup_epochs: 1}}
optimizer: {{lr: 1e-3, layer_decay: 0.7, ema: 0.9}}
engine: {{device: cpu, precision: fp32, strategy: auto}}
logging: {{every: 1, tensorboard: false, progress: none}}
checkpoint: {{every: 3}}
evaluate: {{test: {data}, every_epochs: 1, batch_size: 8, workers: 0}}
"""
LAUNCH = ROOT / "launch" / "finetune.py"
ZERO2 = ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero2.json")
ENGINES = {
    "fsdp2": {"strategy": "fsdp2"},
    "zero2": {"strategy": "deepspeed", "ds_config": f"{ROOT}/ds_configs/zero2.json"},
    "zero3": {"strategy": "deepspeed", "ds_config": f"{ROOT}/ds_configs/zero3_small.json"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("finetune") / "data")


def write_config(path: Path, data: Path, batch: int = 8, epochs: int = 3) -> Path:
    path.write_text(CONFIG.format(data=data, folder=path.with_suffix(""), batch=batch, epochs=epochs))
    return path


def train(world: World, path: str, engine: dict[str, Any], steps: int, state: bool = True) -> dict[str, Any]:
    """Returns the losses of some steps, and the full state after them or only the shapes of its tensors."""
    config = load_config(path, kind=FinetuneConfig)
    config = config.replace(engine=config.engine.replace(**engine), schedule=config.schedule.replace(stop_after=steps))
    task = FinetuneTask(config, world, starting=True)
    found = [float(world.mean(task.step(batch).loss.clone())) for batch in task.loader(0)]
    assert len(found) == steps
    if not state:
        return {"losses": found, "shapes": {piece.name: piece.shape for piece in task.engine.pieces()}}
    return {"losses": found, "state": full_state(world, task.engine)}


@functools.cache
def whole_batch(path: str) -> dict[str, Any]:
    """Returns the result of 5 steps with 32 images each, in one process."""
    return run(train, 1, path, {"strategy": "plain"}, 5, alone=True)[0]


@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_accumulation_4_x_8_equals_batch_32(engine, data, tmp_path_factory):
    path = str(write_config(tmp_path_factory.getbasetemp() / "accumulate.yaml", data, batch=32, epochs=10))
    config = load_config(path, kind=FinetuneConfig)
    assert config.augment.mixup and config.augment.cutmix and config.augment.rand_augment and config.model.drop_path
    expected = whole_batch(path)
    changes = {"accumulation": 4, **ENGINES.get(engine, {"strategy": "plain"})}
    processes = 1 if engine == "plain" else 2
    found = run(train, processes, path, changes, 5, alone=engine == "plain")[0]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    differences = {
        name: float((found["state"][name] - tensor).abs().max())
        for name, tensor in expected["state"].items()
        if name.startswith(("model.", "target."))
    }
    assert len(differences) > 60 and max(differences.values()) <= 1e-6, max(differences.items(), key=lambda d: d[1])


def launch(config: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> Any:
    return start(config, *arguments, launcher=launcher, script=LAUNCH)


@pytest.mark.long
def test_launchers_train_the_same(data, tmp_path):
    alone = write_config(tmp_path / "alone.yaml", data)
    finish(launch(alone), alone)
    expected = losses(alone.with_suffix(""))
    accuracy = [row["top1"] for row in rows(alone.with_suffix("")) if "top1" in row]
    assert sorted(expected) == list(range(1, 19)) and len(accuracy) == 3
    port = str(environment.free_port())
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    deepspeed = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", f"--master_port={port}")
    cases = {
        "torchrun": (("engine.strategy=fsdp2", "engine.accumulation=2"), torchrun),
        "deepspeed": ((*ZERO2, "engine.accumulation=2"), deepspeed),
    }
    for name, (arguments, launcher) in cases.items():
        config = write_config(tmp_path / f"{name}.yaml", data)
        finish(launch(config, *arguments, launcher=launcher), config)
        found = losses(config.with_suffix(""))
        assert sorted(found) == sorted(expected)
        for step, (loss, norm) in expected.items():
            assert found[step] == (pytest.approx(loss, abs=2e-4), pytest.approx(norm, rel=1e-2)), (name, step)
        # of 50 images; rounding may change the prediction for one
        assert [row["top1"] for row in rows(config.with_suffix("")) if "top1" in row] == pytest.approx(
            accuracy, abs=0.021
        )


@pytest.mark.long
def test_a_killed_run_resumes_bit_for_bit(data, tmp_path):
    arguments = ("--processes", "2", *ZERO3)
    whole, broken = (write_config(tmp_path / f"{name}.yaml", data) for name in ("whole", "broken"))
    finish(launch(whole, *arguments), whole)
    process = launch(broken, *arguments)
    deadline = time.monotonic() + 200
    while len(losses(broken.with_suffix(""))) < 8:
        assert process.poll() is None and time.monotonic() < deadline, broken.with_suffix(".log").read_text()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(broken.with_suffix(""))) < 18, "the run ended before it was killed"
    assert "resumed from" in finish(launch(broken, *arguments), broken)
    assert losses(broken.with_suffix("")) == losses(whole.with_suffix(""))
    assert final_hashes(broken.with_suffix("")) == final_hashes(whole.with_suffix(""))
    top = [
        [(row["step"], row["top1"]) for row in rows(path.with_suffix("")) if "top1" in row] for path in (whole, broken)
    ]
    assert top[0] == top[1]


@pytest.mark.long
def test_wide_giant_blocks_train_under_zero3(tmp_path, data):
    """Tests the path of ViT-g/16 with its width, but with 2 of its 40 blocks."""
    path = write_config(tmp_path / "giant.yaml", data, batch=4)
    small = "name: vit_tiny, image_size: 32, patch_size: 4, width: 48, depth: 3, heads: 3"
    path.write_text(path.read_text().replace(small, "name: vit_giant, image_size: 32, patch_size: 16, depth: 2"))
    states = run(train, 2, str(path), {**ENGINES["zero3"], "checkpointing": "full"}, 3, False)
    losses_found = states[0]["losses"]
    assert all(map(torch.isfinite, torch.tensor(losses_found))) and len(losses_found) == 3
    assert states[0]["shapes"]["model.encoder.blocks.1.mlp.fc1.weight"] == (6144, 1408)
