"""The plan of a finetuning run: counts of the built classifier, bytes that autograd keeps, FLOPs of torch's counter."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale.config.finetune_run import ClassifierConfig, FinetuneConfig, FinetuneOptimizerConfig
from ijepa_scale.config.schema import EncoderConfig, EngineConfig
from ijepa_scale.engine.parallelize import checkpoint_blocks
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.classifier import build_classifier, drop_factors
from ijepa_scale.objectives.cross_entropy import soft_cross_entropy
from ijepa_scale.planning.devices import Cluster, find_device
from ijepa_scale.planning.finetune_plan import (
    classifier_activations,
    classifier_footprint,
    count_classifier,
    plan_finetuning,
)
from ijepa_scale.planning.plan import IMAGENET_1K
from ijepa_scale.planning.plan_text import WIDTH
from ijepa_scale.planning.spread import Spread
from launch.plan import main
from tests.unit.planning.count_bytes import LiveBytes

ROOT = Path(__file__).parents[3]
A100 = find_device("a100-80gb")
ENCODER = EncoderConfig(name="vit_tiny", image_size=96, patch_size=8, width=96, depth=4, heads=3)
HUGE = EncoderConfig(name="vit_huge", patch_size=14)
IMAGES = 4
WAYS = {
    "last, after": dict(pool_norm="after"),
    "last 4, before": dict(pool_norm="before", representation="last4"),
    "frozen": dict(pool_norm="before", frozen_blocks=2),
}


def config_of(encoder: EncoderConfig = ENCODER, *, ema: float | None = None, engine: dict | None = None, **model):
    return FinetuneConfig(
        model=ClassifierConfig(encoder=encoder, num_classes=10, **model),
        optimizer=FinetuneOptimizerConfig(ema=ema),
        engine=EngineConfig(**(engine or {})),
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ema", [None, 0.99])
def test_parameters_are_those_of_the_built_classifier(way: str, ema: float | None) -> None:
    config = config_of(ema=ema, **WAYS[way])
    classifier = build_classifier(config.model, device="meta")
    counts = count_classifier(config)
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in classifier.parameters())
    assert (counts.trained, counts.frozen) == (trained, whole - trained)
    assert counts.averaged == (0 if ema is None else whole)


class Step:
    """The forward of a finetuning step on the CPU."""

    def __init__(self, config: FinetuneConfig, precision: str, mode: str) -> None:
        self.classifier = build_classifier(config.model, seed=0).train()
        checkpoint_blocks(self.classifier, mode)
        self.images = torch.zeros(IMAGES, 3, 96, 96)
        self.targets = torch.full((IMAGES, 10), 0.1)
        self.drop = drop_factors(self.classifier.drop_rates, seed=0, step=0, samples=torch.arange(IMAGES).numpy())
        self.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")

    @property
    def existing(self) -> list[Tensor]:
        return [self.images, self.targets, self.drop, *self.classifier.parameters(), *self.classifier.buffers()]

    def __call__(self) -> Tensor:
        with self.autocast():
            logits = self.classifier(self.images, self.drop)
        return soft_cross_entropy(logits, self.targets)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_kept_bytes_and_the_peak_are_those_of_a_step(way: str, precision: str, mode: str) -> None:
    config = config_of(**WAYS[way])
    step = Step(config, precision, mode)
    kept = classifier_activations(config, IMAGES, checkpointing=mode, precision=precision, casts=True).kept
    with LiveBytes(step.existing) as live:
        loss = step()
        assert kept == pytest.approx(live.live, rel=0.05)
        loss.backward()
    found = classifier_footprint(config, Spread(strategy="plain", precision=precision), mode, IMAGES)
    existing = found.weights + found.optimizer + found.target + step.images.nbytes
    assert found.peak - existing == pytest.approx(live.peak, rel=0.12)


@pytest.mark.parametrize("way", WAYS)
def test_flops_are_those_of_torchs_counter(way: str) -> None:
    config = config_of(**WAYS[way])
    classifier = build_classifier(config.model, device="meta").eval()
    images = torch.zeros(IMAGES, 3, 96, 96, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        classifier(images).sum().backward()
    found = plan_finetuning(config.replace(data=config.data.replace(batch_size=8)), Cluster(A100, 1)).flops
    assert found.total * IMAGES == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert found.target == found.predictor == 0


def test_averaged_weights_and_strategies_change_the_memory() -> None:
    plain, averaged, frozen = (
        plan_finetuning(config_of(HUGE, **each), Cluster(A100, 8))
        for each in ({}, dict(ema=0.999), dict(frozen_blocks=30))
    )
    counts = count_classifier(config_of(HUGE))
    assert averaged.chosen.footprint.target == pytest.approx(4 * counts.trained)
    assert averaged.chosen.footprint.peak > plain.chosen.footprint.peak > 2 * frozen.chosen.footprint.states
    assert frozen.flops.total < 0.45 * plain.flops.total
    by_label = {each.spread.label: each for each in plain.strategies}
    assert by_label["fsdp2"].footprint.states == pytest.approx(16 * counts.trained / 8)
    assert [t.purpose for t in by_label["ddp"].time.transfers] == ["all-reduce gradients"]
    assert plain.num_images == IMAGENET_1K and plain.steps == 50 * (IMAGENET_1K // 1024)
    low, high = plain.chosen.mfu
    assert 0.4 < low < high < 0.7


def test_what_does_not_fit_gets_advice_or_is_refused() -> None:
    found = plan_finetuning(config_of(HUGE), Cluster(find_device("rtx-4090"), 8))
    assert not found.chosen.fits and found.advice
    with pytest.raises(ConfigError, match="of vit_huge take at least .* GB per GPU"):
        plan_finetuning(config_of(HUGE), Cluster(dataclasses.replace(A100, memory_bytes=4e9), 1))
    with pytest.raises(ConfigError, match="model.frozen_blocks is 33 of 32 blocks; give at most 32"):
        plan_finetuning(config_of(HUGE, frozen_blocks=33), Cluster(A100, 1))
    with pytest.raises(ConfigError, match="batch 1024 is larger than the 1000 training images"):
        plan_finetuning(config_of(HUGE), Cluster(A100, 1), num_images=1000)


SIZES = {
    "in1k_vitb16": ["model.encoder.name=vit_base"],
    "in1k_vitl16": ["model.encoder.name=vit_large"],
    "lowshot1_vitl16": ["model.encoder.name=vit_large"],
    "demo_finetune": ["model.encoder.name=vit_tiny"],
    "base": ["data.batch_size=1024"],
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/finetune/*.yaml")), ids=lambda path: path.stem)
def test_the_command_plans_every_finetuning_configuration(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)  # where there are no weights and no data
    given = SIZES.get(path.stem, [])
    assert main(["--config", str(path), "--gpus", "8x", "a100", *given]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "masks" not in printed and "classifier of" in printed and max(map(len, printed.splitlines())) <= WIDTH
    assert main(["--config", str(path), "--gpus", "8x", "a100", "--json", *given]) == 0
    assert json.loads(capsys.readouterr().out)["flops"]["target"] == 0


def test_weights_that_are_not_there_need_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{init: {tmp_path}/weights.pth.tar, drop_path: 0.2}}")
    assert main(["--config", str(tmp_path / "c.yaml"), "--gpus", "h100"]) == 2
    assert (
        "weights.pth.tar isn't on this machine, and tells the sizes; set model.encoder.name" in capsys.readouterr().err
    )
