"""Checks that losses and gradients are finite, on all processes together. Must not know any model.

On the CPU the host reads the result before any weight changes. On a GPU that would make the host wait for the device
in each step. There the result is a flag on the device, which stops optimiser and target from that step on, and the host
reads it one step later, when it has long been computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_scale import stopping
from ijepa_scale.engine.world import World
from ijepa_scale.errors import NonFiniteError

NOTHING_MOVED = (
    "Weights, optimiser, target and schedule are as before this step (if the run took a step, it saves them in "
    "`stopped`); look at the images of this step, and resume from the last checkpoint with a lower optimizer.lr, "
    "longer warmup_epochs, optimizer.clip_norm or engine.precision=fp32"
)


class FiniteWatch:
    """Records the losses of a step's micro-batches, and checks on all processes that they are finite."""

    def __init__(self, world: World, *, late: bool = False) -> None:
        """With `late`, results stay on the device, and the host reads them one step later."""
        self._world = world
        self._late = late
        self.leaving = False  # some process was asked to stop; changes at the same step on all
        self._losses: list[Tensor] = []
        self._stopped = torch.zeros((), device=world.device) if late else None
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._first_bad: tuple[int, list[list[float]]] | None = None  # the step that stopped the device

    def record(self, loss: Tensor) -> None:
        """Records the loss of a micro-batch."""
        self._losses.append(loss.detach().float())

    def take(self) -> Tensor:
        """Returns the mean of the recorded losses, () fp32, and clears them."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean

    def check(self, step: int, loss: Tensor, *also: Tensor) -> Tensor | None:
        """Stops all processes if the loss, or a tensor of `also`, isn't finite on one of them.

        Communicates one number per process and tensor, and whether the process was asked to stop. Without `late`, it
        raises for this step or returns None. With `late`, it raises for the step before, or returns the flag, () fp32
        on the device, which isn't 0 from the first bad step on.

        Raises:
            NonFiniteError: a value isn't finite; names the processes and the step.
        """
        asked = torch.full_like(loss, float(stopping.reason() is not None))
        values = self._world.gather(torch.stack([loss, *(a.to(loss) for a in also), asked]))
        if self._stopped is None:
            found = values.tolist()  # host sync on a GPU, for optimisers that a flag on the device can't stop
            _judge(step, self._without_asked(found))
            return None
        self.settle()
        self._stopped.logical_or_(~values.isfinite().all())
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        host.copy_(values, non_blocking=True)
        event = None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending = step, host, event
        return self._stopped

    def settle(self) -> None:
        """Reads the result of the last step. Waits until the device has done that step, but not for later work.

        Raises:
            NonFiniteError: a value wasn't finite. Names the processes and the first bad step, at every later call too.
        """
        if self._first_bad is None and self._pending is not None:
            (step, host, event), self._pending = self._pending, None
            if event is not None:
                event.synchronize()  # host sync: waits for the last step while this one is queued
            values = self._without_asked(host.tolist())  # already in host memory
            if not all(_finite(value) for row in values for value in row):
                self._first_bad = step, values
        if self._first_bad is not None:  # at every call: later steps change nothing and must not look successful
            _judge(*self._first_bad)

    def _without_asked(self, values: list[list[float]]) -> list[list[float]]:
        """Returns what was measured, and notes whether a process was asked to stop."""
        self.leaving = self.leaving or any(row[-1] for row in values)
        return [row[:-1] for row in values]


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
