"""Pretraining from weights that exist: what is taken from the source, what is said, and how such a run resumes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ijepa_scale
from ijepa_scale.checkpoint import store
from ijepa_scale.checkpoint.export import export_published
from ijepa_scale.checkpoint.geometry import with_channels
from ijepa_scale.checkpoint.published_order import published_numbers
from ijepa_scale.checkpoint.sources import open_source
from ijepa_scale.checkpoint.start import optimizer_states, start_from
from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.finetune_run import ClassifierConfig, FinetuneConfig
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.models.pos_embed import positions
from ijepa_scale.models.registry import build_encoder, build_jepa, build_target
from ijepa_scale.train.initial import with_init
from ijepa_scale.train.pretrain import PretrainResult, PretrainTask, pretrain
from tests.unit.train.test_finetune_run import COLORS, picture

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
MODEL = (
    "{name: vit_tiny, image_size: 16, patch_size: 4, width: 24, depth: 2, heads: 2, predictor_width: 12, "
    "predictor_depth: 1}"
)
CONFIG = """
folder: {folder}
model: {model}
masks: {{min_keep: 1, group_size: 6, target_scale: [0.2, 0.4]}}
data: {{train: {data}, batch_size: 6, workers: 0}}
augment: {{mean: [0.4, 0.5, 0.6], std: [0.3, 0.3, 0.3]}}
optimizer: {{lr: 1e-3}}
schedule: {{epochs: 2, warmup_epochs: 1, steps_per_epoch: 3}}
engine: {{device: cpu, precision: fp32, strategy: plain}}
logging: {{every: 1, tensorboard: false, progress: none}}
evaluate: {{every: 3, train: {data}, test: {data}, batch_size: 12}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colors") / "shards"
    samples = [Sample(f"{n:03d}", picture(list(COLORS.values())[n % 3], n), n % 3) for n in range(24)]
    write_shards(samples, folder, classes=list(COLORS))
    return folder


def configure(tmp_path: Path, data: Path, *overrides: str, name: str = "run", model: str = MODEL) -> PretrainConfig:
    path = tmp_path / f"{name}.yaml"
    path.write_text(CONFIG.format(folder=tmp_path / name, data=data, model=model))
    return load_config(path, overrides)


@pytest.fixture(scope="module")
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("first")
    pretrain(configure(tmp_path, data), ALONE)
    return tmp_path / "run"


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_with_its_curves_and_the_next_commands(first: Path) -> None:
    assert (first / "curves.png").stat().st_size > 10_000
    result = pretrain(load_config(first / "config.yaml"), ALONE)  # no steps are left
    commands = [line.split()[1] for line in result.next_commands()]
    assert commands == [f"launch/{name}.py" for name in ("report", "embed", "finetune", "export")]
    assert all(str(first) in line for line in result.next_commands())


def test_a_run_starts_from_a_run_and_resumes_without_it(
    first: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    config = configure(tmp_path, data, f"model.init={source}", "schedule.stop_after=3", name="more", model="{}")
    with caplog.at_level(logging.INFO):
        result = pretrain(config, ALONE)
    assert "loaded the context encoder, 28 tensors, 100.0% of the model's weights" in caplog.text
    assert "loaded the target encoder, 28 tensors" in caplog.text and "loaded the predictor, 19 tensors" in caplog.text
    folder = tmp_path / "more"
    assert "knn_untrained" not in rows(folder)[0] and rows(folder)[0]["step"] == 0
    last = [row for row in rows(first) if "knn" in row][-1]
    assert rows(folder)[0]["knn"] == rows(folder)[0]["knn_start"] == last["knn"]  # the frozen starting point
    assert isinstance(result, PretrainResult) and "(start " in result.figures()
    digest = open_source(source).digest()
    origin = {"source": str(source), "sha256": digest, "state": "weights"}
    assert json.loads((folder / "run.json").read_text())["init"] == origin

    shutil.rmtree(source)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        pretrain(config.replace(schedule=config.schedule.replace(stop_after=None)), ALONE)
    assert f"model.init={source} isn't read again: the run goes on from {folder}" in caplog.text
    assert [row["step"] for row in rows(folder) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "run.json").read_text())["init"] == origin


def test_a_run_at_another_size_resumes_with_its_positions(first: Path, data: Path, tmp_path: Path) -> None:
    overrides = (f"model.init={first}", "model.image_size=24")
    config = configure(tmp_path, data, *overrides, name="large", model="{}")
    images = torch.randn(2, 3, 24, 24)
    pretrain(config.replace(schedule=config.schedule.replace(stop_after=2)), ALONE)
    encoder, _ = ijepa_scale.load(tmp_path / "large")
    assert encoder.position_grid == (4, 4) and torch.equal(encoder.pos_embed[0], positions(24, (6, 6), (4, 4)))
    pretrain(config, ALONE)
    large, _ = ijepa_scale.load(tmp_path / "large", image_size=16)
    assert torch.equal(large.pos_embed[0], positions(24, (4, 4)))  # of the grid that it was trained on at first
    with torch.no_grad():
        assert ijepa_scale.load(tmp_path / "large")[0](images).shape == (2, 36, 24)


def test_features_are_unchanged_after_0_steps(first: Path, data: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    expected = {which: ijepa_scale.load(first, which=which)[0](images) for which in ("context", "target")}
    assert not torch.equal(expected["context"], expected["target"])
    config = with_init(configure(tmp_path, data, f"model.init={first}", model="{}"))
    assert config.model.width == 24 and config.augment.mean == (0.4, 0.5, 0.6)
    task = PretrainTask(config, ALONE)
    with torch.no_grad():
        torch.testing.assert_close(task.engine.target(images), expected["target"], atol=1e-6, rtol=0)
    assert torch.equal(task.engine.module.encoder(images), expected["context"])  # type: ignore[attr-defined]


def test_going_on_with_the_optimiser_equals_never_having_stopped(first: Path, data: Path, tmp_path: Path) -> None:
    pretrain(configure(tmp_path, data, "schedule.stop_after=3", name="half"), ALONE)
    overrides = (f"model.init={tmp_path / 'half'}", "model.init_state=training")
    pretrain(configure(tmp_path, data, *overrides, name="more", model="{}"), ALONE)
    more = rows(tmp_path / "more")
    assert [row["step"] for row in more] == [3, 4, 5, 6, 6] and "loss" not in more[0]
    whole = {row["step"]: row["loss"] for row in rows(first) if "loss" in row}
    assert {row["step"]: row["loss"] for row in more if "loss" in row} == {s: whole[s] for s in (4, 5, 6)}
    with pytest.raises(ConfigError, match="model.init goes on at step 6, but the run ends at step 6; give more"):
        overrides = (f"model.init={first}", "model.init_state=training")
        pretrain(configure(tmp_path, data, *overrides, name="none"), ALONE)


def test_a_source_of_one_encoder_starts_both_and_says_what_is_new(tmp_path: Path) -> None:
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=4, width=24, depth=2, heads=2, seed=4)
    save_file(encoder.state_dict(), tmp_path / "a.safetensors")
    torch.save({"target_encoder": encoder.state_dict()}, tmp_path / "b.pth.tar")
    config = PretrainConfig(model=dict(name="vit_tiny", image_size=16, patch_size=4, width=24, depth=2, heads=2)).model
    for name, held in (("a.safetensors", "one encoder"), ("b.pth.tar", "only the target encoder")):
        jepa = build_jepa(config, seed=1)
        target, before = build_target(jepa), jepa.predictor.mask_token.clone()
        source = open_source(tmp_path / name)
        text = start_from(source, jepa, target).text()
        assert f"holds {held}: encoder and target both start from it" in text
        assert "has no predictor: it is new, with weights drawn from the seed" in text
        assert torch.equal(jepa.predictor.mask_token, before)
        for module in (jepa.encoder, target):
            assert all(torch.equal(t, encoder.state_dict()[n]) for n, t in module.state_dict().items())
        with pytest.raises(CheckpointError, match="holds no optimiser's state of pretraining; set model.init_state=we"):
            optimizer_states(source, config, 10)


def test_a_predictor_that_does_not_fit_is_refused(first: Path, data: Path, tmp_path: Path) -> None:
    config = configure(
        tmp_path, data, f"model.init={first}", "model.predictor_depth=2", "model.predictor_width=24", model="{}"
    )
    with pytest.raises(
        CheckpointError, match="its predictor doesn't match .* model.predictor_width=12 model.predictor_d"
    ):
        PretrainTask(with_init(config), ALONE)


@pytest.mark.parametrize("how", ["interpolated", "computed"])
def test_positions_are_chosen_by_name_in_both_kinds_of_training(first: Path, how: str) -> None:
    trained = (4, 4) if how == "interpolated" else None
    shape: dict[str, Any] = {"init": str(first), "init_positions": how}
    config = with_init(PretrainConfig(model={**shape, "image_size": 32}))
    assert config.model.position_grid == trained
    jepa = build_jepa(config.model, seed=0)
    assert torch.equal(jepa.encoder.pos_embed[0], positions(24, (8, 8), trained))
    assert torch.equal(jepa.predictor.predictor_pos_embed[0], positions(12, (8, 8), trained))
    finetuning = with_init(FinetuneConfig(model=ClassifierConfig(**shape, encoder={"image_size": 32})))
    assert finetuning.model.encoder.position_grid == trained and finetuning.model.encoder.width == 24
    assert finetuning.augment.std == (0.3, 0.3, 0.3)
    same = with_init(PretrainConfig(model=shape))
    assert same.model.image_size == (16, 16) and same.model.position_grid is None


def test_a_run_that_goes_on_from_a_file_of_other_epochs_resumes_exactly(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file took 3 steps in its epoch; here an epoch has 2, so the optimiser is a step ahead of the schedules."""
    pretrain(configure(tmp_path, data, "schedule.stop_after=3", name="half"), ALONE)
    checkpoint = store.Checkpoint(tmp_path / "half" / "checkpoints" / "step-00000003")
    file = export_published(checkpoint, tmp_path / "file.pth.tar", steps_per_epoch=3)
    overrides = (
        f"model.init={file}", "model.init_state=training", "schedule.epochs=4", "schedule.steps_per_epoch=2",
        "evaluate.every=0", "model.heads=2",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        pretrain(configure(tmp_path, data, *overrides, name="whole", model="{}"), ALONE)
    assert "the next step is 2" in caplog.text
    for stop in (4, 8):
        pretrain(configure(tmp_path, data, *overrides, f"schedule.stop_after={stop}", name="cut", model="{}"), ALONE)
    whole, cut = (
        [(row["step"], row["loss"]) for row in rows(tmp_path / name) if "loss" in row] for name in ("whole", "cut")
    )
    assert [step for step, _ in whole] == [3, 4, 5, 6, 7, 8] and cut == whole
    more = ("model.init_state=training", "schedule.epochs=4", "schedule.steps_per_epoch=2", "evaluate.every=0")
    pretrain(configure(tmp_path, data, *overrides, "schedule.stop_after=5", name="half2", model="{}"), ALONE)
    pretrain(configure(tmp_path, data, f"model.init={tmp_path / 'half2'}", *more, name="again", model="{}"), ALONE)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path / "again") if "loss" in row] == whole[
        3:
    ]  # a run as a source, too


@pytest.mark.parametrize(("setting", "expected"), [((), "uint16"), (("data.pixels=float32",), "float32")])
def test_channels_pixels_and_normalisation_come_from_the_source(
    tmp_path: Path, setting: tuple[str, ...], expected: str
) -> None:
    """A run of 13 bands of 16 bits is finetuned without saying so again."""
    sizes = yaml.safe_load(MODEL) | {"channels": 13}
    images = {"mean": (0.25,) * 13, "std": (0.5,) * 13}
    config = PretrainConfig(model=sizes, data={"pixels": "uint16", "batch_size": 8}, augment=images)
    parts = {"model": build_jepa(config.model, seed=0), "target": build_jepa(config.model, seed=1).encoder}
    pieces = [
        Piece(name=f"{part}.{name}", tensor=tensor.flatten(), start=0, shape=tuple(tensor.shape))
        for part, module in parts.items()
        for name, tensor in module.named_parameters()
    ]
    extra = {"config": config.values(), "kind": "pretrain"}
    store.save(tmp_path / "run" / "checkpoints", 3, pieces, world=ALONE, extra=extra, keep=1)
    path = tmp_path / "fine.yaml"
    path.write_text(
        f"folder: {tmp_path / 'fine'}\ndata: {{train: x, batch_size: 8}}\n"
        f"model: {{init: {tmp_path / 'run'}, num_classes: 3}}\naugment: {{rand_augment: null}}\n"
    )
    found = with_init(load_config(path, setting, kind=FinetuneConfig))
    assert (found.model.encoder.channels, found.data.pixels) == (13, expected)
    assert found.augment.mean == images["mean"] and found.augment.std == images["std"]


def test_a_name_too_long_for_a_file_does_not_exist() -> None:
    for name in ("a" * 5000 + "/b", "a" * 5000, "\0"):
        with pytest.raises(CheckpointError, match="doesn't exist; give a run folder|transformers can't load"):
            open_source(name)


def test_what_the_source_does_not_tell_must_be_set(tmp_path: Path) -> None:
    encoder = build_encoder("vit_tiny", image_size=16, patch_size=4, width=24, depth=2, heads=2)
    tensors = encoder.state_dict()
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="doesn't state the heads of its encoder; set model.heads"):
        with_init(PretrainConfig(model={"init": str(tmp_path / "a.safetensors")}))
    found = with_init(PretrainConfig(model={"init": str(tmp_path / "a.safetensors"), "heads": 2})).model
    assert (found.width, found.depth, found.heads, found.image_size, found.patch_size) == (24, 2, 2, (16, 16), 4)
    del tensors["pos_embed"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="doesn't state the image_size of its encoder; set model.encoder.image_size"):
        with_init(FinetuneConfig(model=ClassifierConfig(init=str(tmp_path / "a.safetensors"), encoder={"heads": 2})))


def test_a_state_without_a_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.init_state is training but init is null; name the run or .pth.tar"):
        PretrainConfig(model={"init_state": "training"})


@settings(deadline=None, max_examples=30)
@given(before=st.integers(1, 16), after=st.integers(1, 16), seed=st.integers(0, 99))
def test_equal_channels_give_the_same_tokens_for_any_number_of_them(before: int, after: int, seed: int) -> None:
    weight = torch.randn(6, before, 2, 2, generator=torch.Generator().manual_seed(seed))
    fitted = with_channels(weight, after)
    assert fitted.shape == (6, after, 2, 2) and (fitted is weight) == (before == after)
    grey = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(seed + 1))
    tokens = [(w * grey).sum(dim=(1, 2, 3)) for w in (weight, fitted)]
    torch.testing.assert_close(*tokens, atol=1e-5, rtol=1e-5)


def test_a_published_file_with_read_checkpoint_starts_from_its_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: dict[str, Any] = dict(name="vit_tiny", image_size=64, patch_size=16, predictor_depth=1, predictor_width=48)
    model = PretrainConfig(model=sizes).model
    jepa, target = build_jepa(model, seed=5), build_jepa(model, seed=6).encoder
    tensors = {**jepa.state_dict(), "predictor.predictor_pos_embed": jepa.predictor.predictor_pos_embed}
    numbers = published_numbers(model)
    moments = {
        number: {"step": torch.tensor(4.0), "exp_avg": torch.zeros_like(tensors[name]),
                 "exp_avg_sq": torch.full_like(tensors[name], 1e-8)}
        for number, name in enumerate(numbers) if "pos_embed" not in name
    }  # fmt: skip
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "target_encoder": target}
    wrapped = {name: {f"module.{n}": t for n, t in part.state_dict().items()} for name, part in parts.items()}
    optimizer = {"state": moments, "param_groups": [{"params": list(range(len(numbers)))}]}
    (tmp_path / "logs").mkdir()
    torch.save({**wrapped, "opt": optimizer, "epoch": 2}, tmp_path / "logs" / "jepa-ep2.pth.tar")
    for number in range(8):
        folder = tmp_path / "images" / "train" / f"c{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(COLORS["red"], number))
    content = {
        "data": dict(
            batch_size=4, color_jitter_strength=0.0, crop_scale=[0.3, 1.0], crop_size=64, image_folder="images",
            num_workers=0, pin_mem=True, root_path=str(tmp_path), use_color_distortion=False, use_gaussian_blur=False,
            use_horizontal_flip=False,
        ),
        "logging": dict(folder=str(tmp_path / "logs"), write_tag="jepa"),
        "mask": dict(
            allow_overlap=False, aspect_ratio=[0.75, 1.5], enc_mask_scale=[0.85, 1.0], min_keep=0, num_enc_masks=1,
            num_pred_masks=2, patch_size=16, pred_mask_scale=[0.15, 0.2],
        ),
        "meta": dict(
            copy_data=False, load_checkpoint=True, model_name="vit_tiny", pred_depth=1, pred_emb_dim=48,
            read_checkpoint="jepa-ep2.pth.tar", use_bfloat16=False,
        ),
        "optimization": dict(
            ema=[0.996, 1.0], epochs=4, final_lr=1e-6, final_weight_decay=0.4, ipe_scale=1.0, lr=1e-3, start_lr=2e-4,
            warmup=1, weight_decay=0.04,
        ),
    }  # fmt: skip
    (tmp_path / "published.yaml").write_text(json.dumps(content))
    overrides = ("engine.device=cpu", "engine.strategy=plain", "logging.every=1", "logging.tensorboard=false")
    config = load_config(tmp_path / "published.yaml", [*overrides, "schedule.stop_after=6"])
    with caplog.at_level(logging.INFO):
        pretrain(config, ALONE)
    assert [row["step"] for row in rows(tmp_path / "logs") if "loss" in row] == [5, 6]  # 2 epochs of 2 steps were done
    assert "the optimiser goes on from" in caplog.text and "the next step is 4" in caplog.text
    assert json.loads((tmp_path / "logs" / "run.json").read_text())["init"]["state"] == "training"
    pretrain(load_config(tmp_path / "published.yaml", overrides), ALONE)  # then from its own newer checkpoint
    assert [row["step"] for row in rows(tmp_path / "logs") if "loss" in row] == [5, 6, 7, 8]
