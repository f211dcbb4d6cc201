"""The training step of I-JEPA, as the paper writes it.

What makes it fast or distributed is the engine's; nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ijepa_scale.config import ObjectiveConfig
from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.protocol import Engine, StepInfo
from ijepa_scale.masks import Masks, MasksAhead, MaskSampler
from ijepa_scale.metrics.meters import Meters, feature_std
from ijepa_scale.objectives.jepa import fused_jepa_loss, jepa_loss, jepa_targets, normalise_targets
from ijepa_scale.schedules import Hyper

_OBSERVED = 32  # images whose features the collapse alarm looks at: it's a mean over many places and dims


class TrainStep:
    """One optimiser step: called with this process's part of a global batch."""

    def __init__(
        self,
        engine: Engine,
        *,
        augment: Callable[[Batch], Tensor],
        masks: MaskSampler,
        schedule: Callable[[int], Hyper],
        objective: ObjectiveConfig,
        batch_size: int,
        meters: Meters,
    ) -> None:
        self._engine = engine
        self._augment = augment
        self._masks = MasksAhead(masks, engine.world.device)
        self._num_patches = masks.grid[0] * masks.grid[1]
        self._schedule = schedule
        self._objective = objective
        self._batch_size = batch_size  # of all processes
        self._meters = meters

    def __call__(self, batch: Batch) -> StepInfo:
        """Returns what the step did; moves weights, optimiser and target, or raises before any has moved."""
        hyper = self._schedule(batch.step)  # learning rate, weight decay, momentum
        for micro in self._engine.accumulate(batch):
            images = self._augment(micro)  # (B, 3, H, W)
            masks, wanted = self._masks(micro.step, micro.position, len(micro), self._batch_size)
            tokens = self._engine.target(images, wanted=wanted.places)  # (B, U, D), no gradient
            prediction = self._engine.model(images, masks)  # encode the context, predict the targets
            if "target_loss" in self._engine.triton:
                loss = fused_jepa_loss(prediction, tokens, wanted.rows, masks, self._objective)
            else:
                target = jepa_targets(normalise_targets(tokens), wanted.rows, masks)
                loss = jepa_loss(prediction, target, masks, self._objective)
            self._engine.backward(loss)
            self._observe(tokens[:_OBSERVED], masks, wanted.places[:_OBSERVED])
        info = self._engine.step(hyper, batch.step)
        self._engine.update_target(hyper.momentum, info)  # not after a stopped step
        self._meters.add("loss", info.loss)
        self._meters.add("grad_norm", info.grad_norm)
        self._meters.end_step()
        return info

    def _observe(self, tokens: Tensor, masks: Masks, places: Tensor) -> None:
        self._meters.add("target_std", feature_std(normalise_targets(tokens), places, self._num_patches))
        for name, mean in zip(("context_tokens", "target_tokens"), masks.mean_tokens(), strict=True):
            self._meters.add(name, mean)
