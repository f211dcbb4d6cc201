"""The finetuning step: soft targets, drop path per sample and, optionally, an average of the weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.protocol import Engine, StepInfo
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.objectives.cross_entropy import soft_cross_entropy
from ijepa_scale.schedules import Hyper


class FinetuneStep:
    """Takes one optimiser step with this process's part of a global batch."""

    def __init__(
        self,
        engine: Engine,
        *,
        augment: Callable[[Batch], tuple[Tensor, Tensor]],
        drop_path: Callable[[Batch], Tensor | None],
        schedule: Callable[[int], Hyper],
        momentum: float | None,
        meters: Meters,
    ) -> None:
        self.engine, self.augment, self.drop_path, self.schedule = engine, augment, drop_path, schedule
        self.momentum = momentum  # of the averaged weights; None without an average
        self.meters = meters

    def __call__(self, batch: Batch) -> StepInfo:
        """Updates weights, optimiser and average, or raises before any of them has changed."""
        hyper = self.schedule(batch.step)
        for micro in self.engine.accumulate(batch):
            images, targets = self.augment(micro)  # (B, 3, H, W), (B, classes)
            logits = self.engine.model(images, self.drop_path(micro))
            self.engine.backward(soft_cross_entropy(logits, targets))
        info = self.engine.step(hyper, batch.step)
        if self.momentum is not None:
            self.engine.update_target(self.momentum, info)
        self.meters.count_step(info.stopped, loss=info.loss, grad_norm=info.grad_norm)
        return info
