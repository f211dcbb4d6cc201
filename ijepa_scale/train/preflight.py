"""The report at the start of a finetuning run: batch, learning rates, groups, weights, memory, first loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ijepa_scale.checkpoint.weights import LoadReport
from ijepa_scale.config.finetune_run import LR_BATCH, FinetuneConfig
from ijepa_scale.engine.ds_config import load_ds_config
from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.classification import chance_loss
from ijepa_scale.metrics.classifier_plots import draw_labelled
from ijepa_scale.planning.memory import spread_states
from ijepa_scale.planning.spread import Spread, ZeroBuckets
from ijepa_scale.plurals import counted
from ijepa_scale.schedules import FinetuneSchedule
from ijepa_scale.train.picture import viewable
from ijepa_scale.train.setup import pixels_of

logger = logging.getLogger(__name__)

FILE = "preflight.txt"
PICTURE = "first_batch.png"
_NUM_IMAGES = 8
_NEAR = 0.1  # warns if the first loss differs from chance by more than this share


class Preflight:
    """Collects the facts of a run, and reports them together."""

    def __init__(
        self,
        config: FinetuneConfig,
        batch_size: int,
        schedule: FinetuneSchedule,
        module: nn.Module,
        groups: list[dict[str, Any]],
        labels: np.ndarray,
    ) -> None:
        self._config, self._batch_size, self._schedule = config, batch_size, schedule
        self._groups = [
            {
                "name": group["name"],
                "tensors": len(group["params"]),
                "parameters": sum(parameter.numel() for parameter in group["params"]),
                "lr_scale": group["lr_scale"],
                "decay": group["decay"],
            }
            for group in groups
        ]
        self._num_parameters = sum(parameter.numel() for parameter in module.parameters())
        counts = np.bincount(labels, minlength=config.model.num_classes)
        self._images = (
            f"{counted(len(labels), 'image')}, {counts.min()} to {counts.max()} in each of {len(counts)} classes"
        )

    def lines(self, world: World, loaded: LoadReport | None, first_loss: float) -> list[str]:
        """Returns the report. `first_loss`, in nats, is the mean over the first micro-batch of all processes."""
        config, schedule = self._config, self._schedule
        accumulation = config.engine.accumulation
        each = self._batch_size // (world.size * accumulation)
        rate = config.optimizer
        origin = f" = {rate.base_lr:g} x {self._batch_size} / {LR_BATCH}" if rate.lr is None else ""
        chance = chance_loss(config.model.num_classes)
        trained = sum(group["parameters"] for group in self._groups)
        kept = self._num_parameters - trained + (0 if rate.ema is None else self._num_parameters)
        return [
            f"data      {self._images}",
            f"batch     {self._batch_size} = {counted(world.size, 'process')} x accumulation "
            f"{accumulation} x {counted(each, 'image')}",
            f"rate      peak {schedule.lr:.3g}{origin}; {counted(schedule.total_steps, 'step')}, "
            f"warm-up over the first "
            f"{schedule.warmup_epochs * schedule.steps_per_epoch:.0f}, then to {schedule.min_lr:g}",
            f"weights   {loaded.text() if loaded else 'random (model.init is null)'}",
            f"loss      {first_loss:.4f} at the first batch, chance is {chance:.4f}"
            + ("" if self._is_near(first_loss, chance) else "  <- far from chance: check the labels and the head"),
            self._memory(world, trained, kept),
            "groups    name, tensors, parameters, lr scale, weight decay",
            *(
                f"  {group['name']:<14} {group['tensors']:>4} {group['parameters']:>13,} {group['lr_scale']:>9.5f}  "
                f"{rate.weight_decay if group['decay'] else 0:g}"
                for group in self._groups
            ),
        ]

    def _memory(self, world: World, trained: int, kept: int) -> str:
        """Returns the line on the memory per process of `trained` parameters and of `kept` ones without gradients."""
        engine = self._config.engine
        strategy: str = engine.strategy
        offload = False
        if engine.ds_config is not None:
            zero = load_ds_config(engine.ds_config)["zero_optimization"]
            strategy, offload = f"zero{zero['stage']}", "offload_optimizer" in zero
        spread = Spread(
            strategy=strategy,
            world=world.size,
            replicas=engine.replicas,
            reshard_after_forward=engine.reshard_after_forward,
            zero=ZeroBuckets(offload_optimizer=offload),
        )
        states = spread_states(trained, kept, spread)
        kinds = {
            "weights": states.weights,
            "gradients": states.gradients,
            f"optimiser{' (on the host)' if offload else ''}": states.optimizer,
            "frozen or averaged": states.target,
        }
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in kinds.items())
        return (
            f"memory    {self._num_parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained; fp32 "
            f"states per process under {strategy} x {world.size}: {states.total / 1e9:.3g} GB ({parts}); "
            "activations and buffers are extra"
        )

    def _is_near(self, loss: float, chance: float) -> bool:
        return self._config.model.keep_head or abs(loss - chance) <= _NEAR * chance

    def write(self, folder: Path, world: World, loaded: LoadReport | None, first_loss: float) -> None:
        """Logs the lines and writes them into the run's folder."""
        lines = self.lines(world, loaded, first_loss)
        (folder / FILE).write_text("\n".join(lines) + "\n")
        for line in lines:
            doubtful = "<- far" in line or (line.startswith("weights") and loaded is not None and loaded.notes)
            logger.log(logging.WARNING if doubtful else logging.INFO, "%s", line)

    def draw(self, folder: Path, images: Tensor, targets: Tensor, classes: list[str] | None) -> None:
        """Draws a few images as the model gets them, with their labels. Synchronises. Called once per run."""
        shown = viewable(images[:_NUM_IMAGES], self._config.augment, pixels_of(self._config))
        draw_labelled(shown.cpu(), targets[:_NUM_IMAGES].cpu(), classes, folder / PICTURE)
