"""A run on fewer images than it takes is refused in one line, and starts with the settings that the line names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.distributed.commands import PRETRAIN, finish, start, write_config

FINETUNE = PRETRAIN.with_name("finetune.py")
SMALL = """
folder: {folder}
model: {{encoder: {{name: vit_tiny, image_size: 16, patch_size: 4, width: 24, depth: 1, heads: 2}}, num_classes: 2}}
data: {{train: {data}, batch_size: 8, workers: 0}}
augment: {{rand_augment: null}}
schedule: {{epochs: 1, warmup_epochs: 0}}
engine: {{device: cpu, precision: fp32}}
logging: {{tensorboard: false, progress: none}}
"""
QUICK = ("schedule.stop_after=1", "evaluate.every=0", "health.every=0", "logging.progress=none", "data.workers=0")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "images"), [("pretrain", 1), ("finetune", 3), ("finetune", 5)])
def test_the_settings_of_the_refusal_start_the_run(kind: str, images: int, tmp_path: Path) -> None:
    for number in range(images):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(path)
    config = write_config(tmp_path / "run.yaml", tmp_path / "photos", tmp_path / "run")
    if kind == "finetune":
        config.write_text(SMALL.format(folder=tmp_path / "run", data=tmp_path / "photos"))
    script = {"pretrain": PRETRAIN, "finetune": FINETUNE}[kind]
    given = ("data.reader=imagefolder", *(QUICK if kind == "pretrain" else ()))
    log = finish(start(config, "--processes", "2", *given, script=script), config, code=2)
    assert log.count("fewer than one batch") == 1 and "Traceback" not in log
    (line,) = (line for line in log.splitlines() if "fewer than one batch" in line)
    advice = line.rpartition("; ")[2]
    processes = "1" if "start 1 process" in advice else "2"
    settings = re.findall(r"\w+\.\w+=\d+", advice)
    assert settings, line
    log = finish(start(config, "--processes", processes, *given, *settings, script=script), config)
    assert re.search(r"done: \d+ steps?, loss", log)
