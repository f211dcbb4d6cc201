"""Whether losses and gradients are finite, decided for all processes together. Knows no model.

On the CPU the answer is read before anything moves. Reading it on a GPU would make the host wait for the device
in each step, so there it stays on the device, where it keeps optimiser and target from moving from that step on,
and is read one step later, when it has long been computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_scale.engine.world import World
from ijepa_scale.errors import NonFiniteError

NOTHING_MOVED = (
    "Weights, optimiser, target and schedule have not moved (the run saves that state in `stopped` if it took a step): "
    "resume from the last checkpoint with a lower optimizer.lr, longer warmup_epochs, optimizer.clip_norm or "
    "engine.precision=fp32, and look at the images of this step"
)


class FiniteWatch:
    """The micro-batches' losses of one step, and the word of all processes on whether they are finite."""

    def __init__(self, world: World, *, late: bool = False) -> None:
        """`late`: answers stay on the device and are read a step later."""
        self._world = world
        self._late = late
        self._losses: list[Tensor] = []
        self._stopped = torch.zeros((), device=world.device) if late else None
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._first_bad: tuple[int, list[list[float]]] | None = None  # the step that stopped the device for good

    def record(self, loss: Tensor) -> None:
        """Takes note of a micro-batch's loss."""
        self._losses.append(loss.detach().float())

    def take(self) -> Tensor:
        """Returns the mean of the recorded losses, () fp32, and forgets them."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean

    def check(self, step: int, loss: Tensor, *also: Tensor) -> Tensor | None:
        """Stops all processes where the loss of one, or a tensor of `also`, isn't finite.

        Communicates a number per process and tensor. Early, it raises, and returns None; late, it raises what the
        step before left, and returns the flag, () fp32 on the device: not 0 from the first bad step on.

        Raises:
            NonFiniteError: names the processes and the step.
        """
        words = self._world.gather(torch.stack([loss, *(a.to(loss) for a in also)]))
        if self._stopped is None:
            _judge(step, words.tolist())  # host sync on a GPU: of an optimiser that the device can't stop
            return None
        self.settle()
        self._stopped.logical_or_(~words.isfinite().all())
        host = torch.empty(words.shape, dtype=words.dtype, pin_memory=words.is_cuda)
        host.copy_(words, non_blocking=True)
        event = None
        if words.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending = step, host, event
        return self._stopped

    def settle(self) -> None:
        """Raises what the last step left to be read. Waits for that step on the device, not for what came after it.

        Raises:
            NonFiniteError: names the processes and the step: the first bad one, also at every later call.
        """
        if self._first_bad is None and self._pending is not None:
            (step, host, event), self._pending = self._pending, None
            if event is not None:
                event.synchronize()  # host sync: with the last step, while this one is queued
            words = host.tolist()  # in host memory already
            if not all(_finite(value) for row in words for value in row):
                self._first_bad = step, words
        if self._first_bad is not None:  # each time: no later step moves anything, and none may pass for a good one
            _judge(*self._first_bad)


def _judge(step: int, values: list[list[float]]) -> None:
    bad = [(rank, row[0]) for rank, row in enumerate(values) if not _finite(row[0])]
    if bad:
        which = ", ".join(f"process {rank} has loss {value}" for rank, value in bad)
        raise NonFiniteError(f"step {step}: {which}; expected finite losses. {NOTHING_MOVED}", step)
    if not all(_finite(value) for row in values for value in row):
        bad_ranks = [rank for rank, row in enumerate(values) if not all(map(_finite, row))]
        raise NonFiniteError(
            f"step {step}: the gradient norm is {values[bad_ranks[0]][-1]} on processes {bad_ranks} though every "
            f"loss is finite. {NOTHING_MOVED}",
            step,
        )


def _finite(value: float) -> bool:
    return value - value == 0.0
