"""A user's module adds one component of each kind, chosen by name; without `--plugin` the names mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.commands import ROOT, clean_environment

CONFIG = """
folder: {folder}
seed: 5
model: {{name: vit_tiny, image_size: 32, patch_size: 4, width: 24, depth: 1, heads: 2, predictor_width: 12,
  predictor_depth: 1}}
masks: {{sampler: stripes, target_rows: 2, num_target_blocks: 2, group_size: 8}}
objective: {{loss: log_cosh, scale: 2.0}}
optimizer: {{name: sgd, nesterov_momentum: 0.8}}
data: {{reader: noise, noise_images: 24, batch_size: 8, workers: 0}}
schedule: {{epochs: 1, warmup_epochs: 0}}
engine: {{device: cpu, precision: fp32}}
logging: {{every: 1, tensorboard: false, progress: none, sinks: {{lines: {{file: mine.txt}}}}}}
evaluate: {{evaluator: feature_norm, every: 2, images: 2}}
"""


def launch(tmp_path: Path, *arguments: str, script: str = "pretrain") -> subprocess.CompletedProcess[str]:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG.format(folder=tmp_path / "run"))
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), "--config", str(path), *arguments]
    variables = clean_environment(PYTHONPATH=f"{ROOT}:{Path(__file__).parent}")
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("how", [(), ("--processes", "2", "engine.strategy=ddp")], ids=["alone", "spawned"])
def test_one_of_each_kind_from_outside_the_package(how: tuple[str, ...], tmp_path: Path) -> None:
    found = launch(tmp_path, "--plugin", "my_components", *how)
    assert found.returncode == 0, found.stderr[-3000:]
    folder = tmp_path / "run"
    assert json.loads((folder / "run.json").read_text())["plugins"] == ["my_components"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3 and losses[0] > losses[-1]  # 24 noise images in batches of 8, by the plugin's optimiser
    assert {row["context_tokens"] for row in rows if "loss" in row} == {48.0}  # 6 of 8 rows of 8 patches
    norms = [row for row in rows if "feature_norm" in row]
    assert [row["step"] for row in norms] == [0, 2, 3] and norms[0]["feature_norm"] == norms[2][
        "feature_norm_untrained"
    ]
    mine = [json.loads(line) for line in (folder / "mine.txt").read_text().splitlines()]
    assert [{"seed": 5, **row} for row in rows] == mine
    (last,) = (folder / "checkpoints").iterdir()
    kinds = {name.split(".")[1] for name in json.loads((last / "manifest.json").read_text())["body"]["tensors"]
             if name.startswith("optimizer.")}  # fmt: skip
    assert kinds == {"momentum_buffer"}


def test_plan_and_tune_take_a_configuration_with_components_of_a_module(tmp_path: Path) -> None:
    planned = launch(tmp_path, "--plugin", "my_components", "--gpus", "h100", "engine.device=auto", script="plan")
    assert planned.returncode == 0 and "images/s" in planned.stdout, planned.stderr
    some = ("--steps", "3", "--warmup", "1", "--limit", "1", "--skip", "workers")
    to = tmp_path / "tuned.yaml"
    tuned = launch(tmp_path, "--plugin", "my_components", *some, "--to", str(to), script="tune")
    assert tuned.returncode == 0, tuned.stderr + tuned.stdout
    assert f"python launch/pretrain.py --config {to} --plugin my_components\n" in tuned.stdout
    assert launch(tmp_path, *some, script="tune").returncode == 2


def test_without_the_flag_a_file_cannot_name_them(tmp_path: Path) -> None:
    found = launch(tmp_path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    for said in (
        "masks.sampler is 'stripes'; choose one of multiblock, reference, random, or name the module that registers",
        "objective.loss is 'log_cosh'; choose one of smooth_l1, l2, cosine, or",
        "optimizer.name is 'sgd'; choose one of adamw, lars, or",
        "data.reader is 'noise'; choose one of shards, stream, imagefolder, list, synthetic, or",
        "evaluate.evaluator is 'feature_norm'; choose one of knn, or",
        "logging.sinks",
    ):
        assert said in found.stderr, said


@pytest.mark.parametrize("name", ["../my_components.py", "my components", ".mine"])
def test_what_is_no_module_name_is_refused(name: str, tmp_path: Path) -> None:
    found = launch(tmp_path, "--plugin", name)
    assert found.returncode == 2 and f"--plugin {name}: no such module; give a name that Python" in found.stderr


def test_another_optimizer_does_not_continue_a_run(tmp_path: Path) -> None:
    plugin = ("--plugin", "my_components", "schedule.stop_after=1", "evaluate.every=0")
    assert launch(tmp_path, *plugin).returncode == 0
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text().replace("{name: sgd, nesterov_momentum: 0.8}", "{name: lars}"))
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--config", str(path), *plugin]
    variables = clean_environment(PYTHONPATH=f"{ROOT}:{Path(__file__).parent}")
    found = subprocess.run(
        [*command, "schedule.stop_after=2"], env=variables, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 2 and "optimizer.name was sgd, is lars" in found.stderr, found.stderr


def test_a_removed_sink_does_not_keep_a_run_from_continuing(tmp_path: Path) -> None:
    plugin = ("--plugin", "my_components", "evaluate.every=0")
    assert launch(tmp_path, *plugin, "schedule.stop_after=1").returncode == 0
    found = launch(tmp_path, *plugin, "logging.sinks.lines=false", "schedule.stop_after=2")
    assert found.returncode == 0 and "resumed from" in found.stderr, found.stderr
