"""Draws the masks of the next step on a thread while the current step is computed. Must not know any model.

Masks are a pure function of step and position, so drawing them early doesn't change them.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ijepa_scale.masks.sampler import MaskSampler
from ijepa_scale.masks.types import Masks, Wanted

_Call = tuple[int, int, int, int]


class MasksAhead:
    """Returns the sampler's masks on a device, and starts to draw the masks of the same positions in the next step."""

    def __init__(self, sampler: MaskSampler, device: torch.device | str) -> None:
        self._sampler = sampler
        self._device = torch.device(device)
        self._num_patches = sampler.grid[0] * sampler.grid[1]
        self._drawn: dict[_Call, Future[tuple[Masks, Wanted]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks", initializer=self._enter)

    def __call__(self, step: int, first: int, count: int, batch_size: int) -> tuple[Masks, Wanted]:
        """Returns the masks of these images (see `MaskSampler`) and the target tokens that they need.

        Doesn't synchronise: masks drawn ahead for a GPU are in pinned memory.

        Raises:
            ValueError: an image is outside [0, batch_size).
        """
        call = (step, first, count, batch_size)
        ready = self._drawn.pop(call, None)
        masks, wanted = ready.result() if ready is not None else self._draw(*call)
        for late in [key for key in self._drawn if key[0] < step]:
            self._drawn.pop(late).cancel()  # the batch was divided differently, or a step was skipped
        following = (step + 1, first, count, batch_size)
        if following not in self._drawn:
            self._drawn[following] = self._thread.submit(self._draw, *following)
        return masks.map(self._move), wanted.map(self._move)

    def _enter(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # otherwise pinning would open a context on GPU 0

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _draw(self, step: int, first: int, count: int, batch_size: int) -> tuple[Masks, Wanted]:
        masks = self._sampler(step, first, count, batch_size)
        wanted = Wanted.of(masks, count, self._num_patches)
        if self._device.type == "cuda":
            masks, wanted = masks.map(Tensor.pin_memory), wanted.map(Tensor.pin_memory)
        return masks, wanted
