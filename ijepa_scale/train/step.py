"""The training step of I-JEPA, as the paper writes it.

The engine makes it fast and distributed, and this module must not know how. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ijepa_scale.data.batch import Batch
from ijepa_scale.engine.protocol import Engine, StepInfo
from ijepa_scale.masks import MasksAhead, MaskSampler
from ijepa_scale.metrics.meters import Meters
from ijepa_scale.metrics.targets import TargetMeters
from ijepa_scale.objectives.protocol import Objective
from ijepa_scale.schedules import Hyper


class TrainStep:
    """Takes one optimiser step with this process's part of a global batch of `batch_size` images."""

    def __init__(
        self,
        engine: Engine,
        *,
        augment: Callable[[Batch], Tensor],
        masks: MaskSampler,
        schedule: Callable[[int], Hyper],
        objective: Objective,
        batch_size: int,
        meters: Meters,
    ) -> None:
        self.engine, self.augment, self.schedule, self.objective = engine, augment, schedule, objective
        self.masks = MasksAhead(masks, engine.world.device)
        self.batch_size, self.meters = batch_size, meters
        self.by_block = False  # whether the next step measures the gradient's norm in each block
        self.observe = TargetMeters(meters, masks.grid[0] * masks.grid[1])

    def __call__(self, batch: Batch) -> StepInfo:
        """Updates weights, optimiser and target, or raises before any of them has changed."""
        hyper = self.schedule(batch.step)  # learning rate, weight decay, momentum
        for micro in self.engine.accumulate(batch):
            images = self.augment(micro)  # (B, 3, H, W)
            masks, wanted = self.masks(micro.step, micro.position, len(micro), self.batch_size)
            tokens = self.engine.target(images, wanted=wanted.patches)  # (B, U, D), no gradient
            prediction = self.engine.model(images, masks)  # encode the context, predict the targets
            self.engine.backward(self.objective(prediction, tokens, masks, wanted))
            self.observe(tokens, masks, wanted)
        info = self.engine.step(hyper, batch.step, by_block=self.by_block)
        self.engine.update_target(hyper.momentum, info)  # exact EMA, not after a stopped step
        self.meters.count_step(info.stopped, loss=info.loss, grad_norm=info.grad_norm)
        return info
