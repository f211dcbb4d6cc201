"""A finetuning run in one process, from its configuration to its results, and its refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.manifest import amend, read_manifest
from ijepa_scale.checkpoint.sources import read_weights
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.yaml_text import parse_yaml, plain, write_yaml
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError, DataError, UserError
from ijepa_scale.evaluate.predictions import ImageClassifier
from ijepa_scale.schedules import FinetuneSchedule
from ijepa_scale.train.finetune import FinetuneTask, finetune
from ijepa_scale.train.preflight import Preflight
from ijepa_scale.train.pretrain import pretrain
from launch import export, predict
from tests.unit.config.test_config_earlier import in_earlier_names

ROOT = Path(__file__).parents[3]
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
COLORS = {"blue": (30, 40, 220), "green": (20, 200, 60), "red": (220, 30, 30)}
CONFIG = """
folder: {folder}
model:
  encoder: {{name: vit_tiny, image_size: 16, patch_size: 4, width: 24, depth: 2, heads: 2}}
  num_classes: 3
  drop_path: 0.1
data: {{train: {data}, batch_size: 6, workers: 0}}
augment: {{crop_scale: [0.5, 1.0], rand_augment: null, random_erasing: 0.0}}
optimizer: {{lr: 3e-3, layer_decay: 0.9}}
schedule: {{epochs: 10, warmup_epochs: 1}}
engine: {{device: cpu, precision: fp32, strategy: plain, accumulation: {accumulation}}}
logging: {{every: 5, tensorboard: false, progress: none}}
evaluate: {{test: {data}, every_epochs: 5, batch_size: 7, workers: 0}}
"""


def picture(color: tuple[int, int, int], number: int, size: int = 20) -> bytes:
    noise = np.random.default_rng(number).integers(-25, 25, (size, size, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_colors(folder, per_class=12, labels=(0, 1, 2)):
    samples = [
        Sample(f"{number:03d}", picture(list(COLORS.values())[label], number), labels[label])
        for number, label in enumerate(np.arange(3 * per_class) % 3)
    ]
    write_shards(samples, folder, classes=list(COLORS))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_colors(tmp_path_factory.mktemp("colors") / "shards")


def configure(tmp_path, data, *overrides: str, accumulation: int = 1) -> FinetuneConfig:
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path / "run", data=data, accumulation=accumulation))
    return load_config(path, overrides, kind=FinetuneConfig)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("finished")
    result = finetune(configure(tmp_path, data), ALONE)
    return tmp_path / "run", result


def test_a_run_learns_colours_and_writes_its_results(finished):
    folder, result = finished
    assert result.steps == 60 and result.top1 == result.best_top1 == 1.0
    commands = [line.split()[1] for line in result.next_commands()]
    assert commands == ["launch/report.py", "launch/predict.py", "launch/export.py"]
    assert all(str(folder) in line.split() for line in result.next_commands())
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "best", "checkpoints", "classes.csv", "config.yaml", "confusion.png", "curves.png", "first_batch.png",
        "metrics.jsonl", "model.safetensors", "preflight.txt", "results.json", "run.json",
    }  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ijepa_scale.classes"]) == list(COLORS)
        assert file.get_tensor("head.weight").shape == (3, 24)
    assert json.loads((folder / "results.json").read_text())["images"] == 36
    assert json.loads((folder / "run.json").read_text())["warm_up_s"] > 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "top1" in row] == [30, 60]
    losses = [row for row in rows if "loss" in row]
    assert losses[-1]["loss"] < losses[0]["loss"] and "momentum" not in losses[0] and losses[0]["images_seen"] == 30


def test_the_preflight_reports_batch_rates_groups_and_first_loss(finished):
    text = (finished[0] / "preflight.txt").read_text()
    assert "36 images, 12 to 12 in each of 3 classes" in text
    assert "6 = 1 process x accumulation 1 x 6 images" in text
    assert "peak 0.003; 60 steps, warm-up over the first 6, then to 1e-06" in text
    assert "random (model.init is null)" in text
    assert "1.0986 at the first batch, chance is 1.0986" in text and "far from chance" not in text
    groups = [line.split() for line in text.splitlines() if line.startswith("  layer")]
    scales = {line[1]: float(line[-2]) for line in groups if "1-D" not in line}
    assert scales == pytest.approx({"0": 0.9**3, "1": 0.9**2, "2": 0.9, "3": 1.0}, abs=1e-5)
    assert {line[-1] for line in groups if "1-D" in line} == {"0"} and groups[-1][-1] == "0.05"


@pytest.mark.parametrize(
    ("overrides", "size", "text"),
    [
        ((), 1, "under plain x 1: 6.4 GB (weights 1.6, gradients 1.6, optimiser 3.2, frozen or averaged 0)"),
        (
            ("engine.strategy=deepspeed", f"engine.ds_config={ROOT}/ds_configs/zero2.json", "optimizer.ema=0.99"),
            8,
            "under zero2 x 8: 4 GB (weights 1.6, gradients 0.2, optimiser 0.6, frozen or averaged 1.6)",
        ),
        (("engine.strategy=fsdp2",), 4, "under fsdp2 x 4: 3.2 GB (weights 2, gradients 0.4, optimiser 0.8, frozen"),
    ],
)
def test_the_memory_line_is_per_process(data, tmp_path, overrides, size, text):
    config = configure(tmp_path, data, *overrides)
    module = torch.nn.Linear(20_000, 20_000, bias=False, device="meta")  # 400 M parameters
    group = {"name": "all", "params": [module.weight], "lr_scale": 1.0, "decay": True}
    schedule = FinetuneSchedule(steps_per_epoch=6, epochs=10, warmup_epochs=1, lr=1e-3, min_lr=1e-6, weight_decay=0.05)
    preflight = Preflight(config, 8 * 6, schedule, module, [group], np.array([0, 1, 2]))
    lines = preflight.lines(dataclasses.replace(ALONE, size=size), None, 1.1)
    assert text in next(line for line in lines if line.startswith("memory"))


def test_a_finished_run_takes_no_more_steps(finished, data):
    folder, before = finished
    again = finetune(configure(folder.parent, data), ALONE)
    assert (again.steps, again.top1, again.checkpoint) == (60, 1.0, before.checkpoint) and again.loss is None


def test_a_run_of_earlier_names_goes_on_and_is_read(data, tmp_path, caplog):
    """Its config.yaml, its checkpoints and the user's file have the names of before `schedule` and `evaluate.test`."""
    few = ("schedule.epochs=2", "evaluate.every_epochs=1", "checkpoint.every=2")
    straight = finetune(configure(tmp_path / "straight", data, *few), ALONE)
    stopped = configure(tmp_path / "run", data, *few, "schedule.stop_after=6")
    finetune(stopped, ALONE)
    folder = Path(stopped.folder)
    for checkpoint in folder.glob("*/step-*"):
        extra = read_manifest(checkpoint).extra
        identity = extra["identity"]
        identity["optimizer"] |= identity.pop("schedule")
        amend(checkpoint, {**extra, "config": in_earlier_names(extra["config"])})
    saved = folder / "config.yaml"
    saved.write_text(write_yaml(in_earlier_names(plain(parse_yaml(saved.read_text(), "config.yaml")))))
    assert ImageClassifier(folder).classes == list(COLORS)
    more = load_config(saved, ["stop_after=null", "resume=auto"], kind=FinetuneConfig)
    assert more == stopped.replace(schedule=stopped.schedule.replace(stop_after=None))
    result = finetune(more, ALONE)
    changes = [text for text in caplog.messages if text.startswith("setting changed since")]
    assert changes == ["setting changed since step-00000006: schedule.stop_after was 6, is None"]
    assert (result.steps, result.loss, result.top1) == (straight.steps, straight.loss, straight.top1)
    for name, tensor in read_weights(straight.checkpoint).tensors.items():
        assert torch.equal(read_weights(result.checkpoint).tensors[name], tensor)
    longer = load_config(saved, ["optimizer.epochs=3", "stop_after=null"], kind=FinetuneConfig)
    with pytest.raises(CheckpointError, match="schedule.epochs was 2.0, is 3.0"):
        finetune(longer, ALONE)


def test_the_best_state_of_an_earlier_run_is_not_mistaken_for_this_runs(data, tmp_path):
    few = ("schedule.epochs=2", "evaluate.every_epochs=0.17", "data.batch_size=12")
    finetune(configure(tmp_path, data, *few), ALONE)
    folder = tmp_path / "run"
    (left,) = (folder / "best").iterdir()
    left.rename(left.with_name("step-00000099"))  # higher than any step of the next run
    shutil.rmtree(folder / "checkpoints")
    finetune(configure(tmp_path, data, *few, "optimizer.lr=1e-9", "seed=1"), ALONE)
    assert ImageClassifier(folder).checkpoint.name != "step-00000099"
    assert (folder / "best-1" / "step-00000099").is_dir() and (folder / "metrics-1.jsonl").is_file()


def test_prediction_names_classes(finished, tmp_path, capsys):
    for number, (name, color) in enumerate(COLORS.items()):
        (tmp_path / f"{name}.png").write_bytes(picture(color, 100 + number, 40))
    images = [str(tmp_path / f"{name}.png") for name in COLORS]
    assert predict.main([*images, "--model", str(finished[0]), "--top", "1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1::2]] == list(COLORS) and lines[::2] == images
    predictor = ImageClassifier(finished[0])
    assert predictor.checkpoint.parent.name == "best"
    guesses = predictor(predictor.load(images[2])[None])[0]
    assert len(guesses) == 3 and sum(guess.probability for guess in guesses) == pytest.approx(1.0)


def test_averaged_weights_are_exact_and_are_evaluated(data, tmp_path):
    config = configure(tmp_path, data, "optimizer.ema=0.9", "data.batch_size=12", "evaluate.every_epochs=10")
    task = FinetuneTask(config, ALONE, starting=True)
    expected = {name: tensor.clone() for name, tensor in task.engine.module.named_parameters()}
    for batch in task.loader(0):
        task.step(batch)
        for name, tensor in task.engine.module.named_parameters():
            expected[name].lerp_(tensor.detach(), 0.1)
    for name, tensor in task.engine.target_module.named_parameters():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    finetune(config, ALONE)
    loaded = dict(ImageClassifier(tmp_path / "run").module.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    target, context = (read_weights(tmp_path / "run", which=which) for which in ("target", "context"))
    assert torch.equal(target.tensors["head.weight"], expected["head.weight"])
    assert not torch.equal(context.tensors["head.weight"], expected["head.weight"])


def test_prediction_errors_name_the_problem(finished, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    for image, text in (
        (tmp_path / "no.jpg", "no.jpg: there is no such file"),
        (tmp_path / "text.jpg", "not an image of a known format"),
    ):
        assert predict.main([str(image), "--model", str(finished[0])]) == 2
        assert text in capsys.readouterr().err
    for device, text in (
        ("gpu", "device 'gpu' is unknown; give cpu"),
        ("cuda:99", "device cuda:99 can't be used: this"),
    ):
        assert predict.main(["x.jpg", "--model", str(finished[0]), "--device", device]) == 2
        assert text in capsys.readouterr().err
    assert predict.main(["x.jpg", "--model", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err


def test_prediction_skips_what_is_bad_and_reads_folders(finished, tmp_path, capfd):
    model = ["--model", str(finished[0]), "--top", "1"]
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("1.png", "deep/2.png", "deep/\udcff.png")):
        (folder / name).write_bytes(picture(COLORS["red"], number))
    (folder / ".hidden.png").touch()
    assert predict.main([str(folder), *model]) == 0
    captured = capfd.readouterr()
    assert captured.out.count("  red\n") == 3 and "\\xff.png\n" in captured.out
    assert captured.err == f"not read in {folder}: 1 x .*.png\n"
    (folder / "0.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(folder / "deep" / "1.jpg")
    (tmp_path / "empty").mkdir()
    last = tmp_path / "last.png"
    last.write_bytes(picture(COLORS["blue"], 9))
    assert predict.main([str(tmp_path / "empty"), str(folder), "no.jpg", str(last), *model]) == 2
    captured = capfd.readouterr()
    assert captured.out.count("  red\n") == 3 and captured.out.endswith(f"{last}\n{captured.out.splitlines()[-1]}\n")
    for text in (
        f"folder {tmp_path}/empty holds no image (found: nothing); name others", "0.jpg: there is no such file",
        "deep/1.jpg: not a regular file", "image no.jpg: there is no such file",
        "error: skipped 4 images or folders; replace or drop those named above",
    ):  # fmt: skip
        assert text in captured.err, text


def test_a_bad_evaluation_image_is_refused_before_the_training(data, tmp_path):
    for number, name in enumerate(COLORS):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.png").write_bytes(picture(COLORS[name], number)[: 200 if number < 2 else None])
    overrides = (f"evaluate.test={tmp_path / 'val'}", "evaluate.reader=imagefolder")
    with pytest.raises(DataError, match="evaluate.test: 2 of 3 images can't be used, .*blue/1.png .*; .*green/1.png"):
        finetune(configure(tmp_path, data, *overrides), ALONE)
    assert not (tmp_path / "run").exists()


def test_weights_come_from_a_finished_run(finished, data, tmp_path):
    folder, _ = finished
    config = configure(tmp_path, data, f"model.init={folder}", "model.keep_head=true", "schedule.stop_after=1")
    finetune(config, ALONE)
    text = (tmp_path / "run" / "preflight.txt").read_text()
    assert "100.0% of the model's weights" in text and "loaded its only encoder" in text
    first = float(text.split("loss")[1].split()[0])
    assert first < 0.9  # the head was loaded too, so the loss is below chance


@pytest.mark.parametrize("source", ["", "/model.safetensors"])
def test_a_kept_head_must_match_the_classes_of_the_data(finished, data, tmp_path, source):
    shuffled = [Sample(f"{number}", picture((0, 0, 0), number), number) for number in range(3)]
    write_shards(shuffled, tmp_path / "other", classes=["blue", "red", "green"])
    changes = ("evaluate.test=null", "data.batch_size=2", f"model.init={finished[0]}{source}", "schedule.stop_after=1")
    text = "its head's class 1 is green, the data's red .2 of 3 differ.; give data with the head's classes"
    with pytest.raises(CheckpointError, match=text):
        finetune(configure(tmp_path, tmp_path / "other", *changes, "model.keep_head=true"), ALONE)
    finetune(configure(tmp_path, tmp_path / "other", *changes), ALONE)  # a new head matches any classes


def test_the_preflight_counts_frozen_and_averaged_weights(data, tmp_path):
    sizes = []
    for frozen, ema in ((0, "null"), (2, "null"), (2, "0.9")):
        changes = ("model.encoder.width=192", f"model.frozen_blocks={frozen}", f"optimizer.ema={ema}")
        task = FinetuneTask(configure(tmp_path, data, *changes), ALONE, starting=True)
        whole = sum(parameter.numel() for parameter in task.engine.module.parameters())
        trained = sum(parameter.numel() for parameter in task.engine.module.parameters() if parameter.requires_grad)
        expected = 16 * trained + 4 * (whole - trained) + (0 if ema == "null" else 4 * whole)
        (line,) = (line for line in task.preflight.lines(ALONE, None, 1.0) if line.startswith("memory"))
        assert f": {expected / 1e9:.3g} GB (weights" in line
        sizes.append(expected)
    assert sizes[1] < sizes[2] < sizes[0]


@pytest.mark.parametrize(
    ("overrides", "kind", "text"),
    [
        (
            ("model.width=48", "model.init={run}"),
            CheckpointError,
            "its width is 24, the model's 48; set model.encoder.name or",
        ),
        (("model.num_classes=5",), DataError, "the data names 3 classes .* but model.num_classes is 5"),
        (
            ("model.num_classes=2",),
            DataError,
            "data.train: 12 of 36 images have no label from 0 to 1 .*002 with label 2",
        ),
        (
            ("data.batch_size=5", "engine.accumulation=2"),
            UserError,
            "batch 5 is not divisible by 1 process x accumul",
        ),
        (("data.batch_size=100",), DataError, "fewer than one batch of 100"),
        (("schedule.stop_after=0",), ConfigError, "the run has 0 steps; give more epochs or a larger stop_after"),
        (("model.init={run}/nothing",), CheckpointError, "nothing doesn't exist; give a run folder"),
        (("evaluate.test={other}",), DataError, "have different classes .only one has black, blue"),
    ],
)
def test_bad_settings_are_refused(finished, data, tmp_path, overrides, kind, text):
    (tmp_path / "a").mkdir()
    write_shards([Sample("0", picture((0, 0, 0), 0), 0)], tmp_path / "other", classes=["black", "white"])
    changes = [override.format(run=finished[0], other=tmp_path / "other") for override in overrides]
    with pytest.raises(kind, match=text):
        finetune(configure(tmp_path / "a", data, *changes), ALONE)
    assert not (tmp_path / "a" / "run").exists()


def test_mixing_pairs_refuses_an_odd_micro_batch(data, tmp_path):
    with pytest.raises(UserError, match="has 3 images, but mixup and cutmix mix pairs; try data.batch_size=6,"):
        finetune(configure(tmp_path, data, "data.batch_size=9", "engine.accumulation=3"), ALONE)


def test_an_empty_class_folder_is_refused(data, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
    (tmp_path / "images" / "a" / "0.png").write_bytes(picture((1, 2, 3), 0))
    config = configure(tmp_path, tmp_path / "images", "data.reader=imagefolder", "model.num_classes=2")
    with pytest.raises(DataError, match="class folder .*/b holds no image"):
        finetune(config, ALONE)


def test_a_run_with_other_settings_is_not_continued(finished, tmp_path):
    changes = ("augment.mixup=0.3", "optimizer.lr=1e-3", "data.batch_size=12", "data.window_shards=3", "seed=1")
    config = configure(finished[0].parent, write_colors(tmp_path / "other", per_class=10), *changes)
    with pytest.raises(CheckpointError) as caught:
        finetune(config, ALONE)
    for said in (
        "augment.mixup was 0.8, is 0.3",
        "optimizer.lr was 0.003, is 0.001",
        "batch size of all processes was 6, is 12",
        "data.window_shards was 8, is 3",
        "seed was 0, is 1",
        "; data was ",
    ):
        assert said in str(caught.value), said


def test_a_run_of_another_kind_is_not_continued(finished, data):
    config = PretrainConfig(folder=str(finished[0]), data={"train": str(data), "batch_size": 4, "workers": 0},
        engine={"strategy": "plain", "device": "cpu"}, model={"name": "vit_tiny", "image_size": 32, "patch_size": 4},
        masks={"min_keep": 3, "group_size": 4})  # fmt: skip
    with pytest.raises(CheckpointError, match="belongs to a finetune run, but this is a pretrain run; set another fol"):
        pretrain(config, ALONE)


def test_export_from_the_command_line(finished, tmp_path, capsys):
    to = tmp_path / "out.safetensors"
    assert export.main([str(finished[0]), "--to", str(to)]) == 0
    assert export.main([str(finished[0]), "--to", str(to)]) == 2
    assert "out.safetensors exists; give another name, or add --overwrite" in capsys.readouterr().err
    assert export.main([str(finished[0]), "--to", str(to), "--overwrite"]) == 0
    assert export.main([str(finished[0]), "--to", str(tmp_path / "out.bin")]) == 2
    assert "out.bin ends in none of .safetensors" in capsys.readouterr().err and not (tmp_path / "out.bin").exists()
    assert export.main([str(tmp_path / "no"), "--to", str(tmp_path / "b.safetensors")]) == 2
    assert "doesn't exist" in capsys.readouterr().err and not (tmp_path / "b.safetensors").exists()


def test_the_state_just_written_survives_older_ones_of_later_steps(tmp_path):
    for step in (30, 20):
        written = store.save(tmp_path, step, [], world=ALONE, extra={}, keep=1)
        assert written.is_dir()
