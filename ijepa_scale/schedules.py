"""Learning rate, weight decay and EMA momentum as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """The hyperparameters of one training step."""

    lr: float
    weight_decay: float
    momentum: float = 1.0  # of the target encoder's update; 1.0 changes nothing, and suits runs without a target


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The published schedules. Source: the I-JEPA paper (arXiv 2301.08243), appendix A, and its released code.

    `steps_per_epoch` counts optimiser steps. `warmup_epochs` and `epochs` may be fractions.
    """

    steps_per_epoch: int
    epochs: float
    warmup_epochs: float
    ipe_scale: float
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    momentum: tuple[float, float]

    @property
    def total_steps(self) -> int:
        """Returns the number of optimiser steps of the whole run."""
        return int(self.epochs * self.steps_per_epoch)

    def __call__(self, step: int) -> Hyper:
        """Returns the hyperparameters of optimiser step `step`, counted from 0.

        As in the published code, learning rate and weight decay are those at step + 1, and the momentum that at step.
        """
        return Hyper(
            lr=self.learning_rate(step + 1), weight_decay=self.decay(step + 1), momentum=self.ema_momentum(step)
        )

    def learning_rate(self, s: int) -> float:
        """Returns the learning rate at s = step + 1: a linear warm-up, then a cosine."""
        warmup = int(self.warmup_epochs * self.steps_per_epoch)
        horizon = int(self.ipe_scale * self.epochs * self.steps_per_epoch)
        if s < warmup:
            return self.start_lr + s / warmup * (self.lr - self.start_lr)
        progress = (s - warmup) / max(1, horizon - warmup)
        cosine = self.final_lr + (self.lr - self.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return max(self.final_lr, cosine)

    def decay(self, s: int) -> float:
        """Returns the weight decay at s = step + 1: a cosine from `weight_decay` that ends at `final_weight_decay`."""
        horizon = int(self.ipe_scale * self.epochs * self.steps_per_epoch)
        final, first = self.final_weight_decay, self.weight_decay
        value = final + (first - final) * 0.5 * (1.0 + math.cos(math.pi * s / horizon))
        return max(final, value) if final <= first else min(final, value)

    def ema_momentum(self, step: int) -> float:
        """Returns the momentum at `step`, counted from 0: a linear ramp from momentum[0] to momentum[1]."""
        first, last = self.momentum
        return first + step * (last - first) / (self.steps_per_epoch * self.epochs * self.ipe_scale)


@dataclass(frozen=True, kw_only=True)
class FinetuneSchedule:
    """A warm-up from 0, then a cosine, updated at each optimiser step. Source: arXiv 2111.06377, appendix A.1.

    `steps_per_epoch` counts optimiser steps, whatever the accumulation. `epochs` and `warmup_epochs` may be fractions.
    `lr` and `min_lr` are absolute: already scaled by the batch size, but not yet by layer.
    """

    steps_per_epoch: int
    epochs: float
    warmup_epochs: float
    lr: float
    min_lr: float
    weight_decay: float

    @property
    def total_steps(self) -> int:
        """Returns the number of optimiser steps of the whole run."""
        return int(self.epochs * self.steps_per_epoch)

    def __call__(self, step: int) -> Hyper:
        """Returns the hyperparameters of optimiser step `step`, counted from 0; weight decay is constant."""
        return Hyper(lr=self.learning_rate(step), weight_decay=self.weight_decay)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate at epoch e = step / steps_per_epoch.

        It is lr e / warmup during the warm-up, so the first step has rate 0; then min_lr + (lr - min_lr) / 2
        (1 + cos(pi (e - warmup) / (epochs - warmup))); and `min_lr` after the end of the run.
        """
        epoch = step / self.steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if epoch >= self.epochs:
            return self.min_lr
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
