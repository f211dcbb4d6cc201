"""Checks that losses and gradients are finite and no spikes, on all processes together. Must not know any model.

On the CPU the host reads the result before any weight changes. On a GPU that would make the host wait for the device
in each step. There the result is a flag on the device, which keeps optimiser and target from moving in that step, and
the host reads it one step later, when it has long been computed and before the next step can move anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_scale import stopping
from ijepa_scale.config.spikes import SpikesConfig
from ijepa_scale.engine.spikes import Limits, SpikeJudge
from ijepa_scale.engine.world import World
from ijepa_scale.errors import NonFiniteError, SpikeError

REMEDY = "a lower optimizer.lr, longer warmup_epochs, optimizer.clip_norm or engine.precision=fp32"


class FiniteWatch:
    """Records the losses of a step's micro-batches, and checks on all processes that they are finite and no spikes."""

    def __init__(self, world: World, *, late: bool = False, in_parts: bool = False) -> None:
        """With `late`, results stay on the device, and the host reads them one step later.

        With `in_parts`, each process gives the sum of squares of its part of the gradient instead of the norm.
        """
        self.judge = SpikeJudge(SpikesConfig(action="none"))
        self.leaving = False  # some process was asked to stop; changes at the same step on all
        self.norm = 0.0  # of the gradient in the last step that the host has read, if it is given
        self.left_out = False  # the host knows already that the current step must change nothing
        self._world, self._late, self._in_parts = world, late, in_parts
        self._losses: list[Tensor] = []
        self._pending: tuple[int, Tensor, Limits, torch.cuda.Event | None] | None = None
        self._end: NonFiniteError | SpikeError | None = None  # why the run ends; what came later changed nothing

    def record(self, loss: Tensor) -> None:
        """Records the loss of a micro-batch."""
        self._losses.append(loss.detach().float())

    def take(self) -> Tensor:
        """Returns the mean of the recorded losses, () fp32, and clears them."""
        mean = torch.stack(self._losses).mean()
        self._losses.clear()
        return mean

    def check(self, step: int, loss: Tensor, norm: Tensor | None = None) -> Tensor | None:
        """Judges the loss and the gradient norm of all processes, and returns a flag: unless 0, nothing may move.

        Communicates one number per process and tensor, and whether the process was asked to stop. Without `late`, it
        judges this step: it raises, or returns 1 with `left_out` set, or returns None. With `late`, it raises for the
        step before, or returns the flag, () fp32 on the device.

        Raises:
            NonFiniteError: a value isn't finite; names the processes and the step.
            SpikeError: a spike ends the run.
        """
        asked = torch.full_like(loss, float(stopping.reason() is not None))
        values = self._world.gather(torch.stack([loss, *(() if norm is None else [norm.to(loss)]), asked]))
        judged = self._judged(values)
        if not self._late:
            found = judged.tolist()  # host sync on a GPU, for optimisers that a flag on the device can't stop
            self.left_out = self._settle(step, found, self.judge.limits())
            return torch.ones_like(loss) if self.left_out else None
        self.settle()
        self.left_out = self.judge.roll_back is not None  # the state is from after a spike: the loop replaces it
        if self.left_out:
            return torch.ones_like(loss)
        limits = self.judge.limits()
        stopped = ~judged.isfinite().all()
        if self.judge.config.prevents:
            stopped.logical_or_((judged[0] > limits.loss).logical_or_(judged[1] > limits.norm))
        host = torch.empty(judged.shape, dtype=judged.dtype, pin_memory=judged.is_cuda)
        host.copy_(judged, non_blocking=True)
        event = None
        if judged.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending = step, host, limits, event
        return stopped.float()

    def _judged(self, values: Tensor) -> Tensor:
        """Returns the mean loss, the gradient norm (0 if it isn't known), and then all values (processes, ...)."""
        loss, norms = values[:, 0].mean(), values[:, 1:-1]
        norm = norms.sum().sqrt() if self._in_parts else norms.amax() if norms.numel() else torch.zeros_like(loss)
        return torch.cat([torch.stack([loss, norm]), values.flatten()])

    def settle(self) -> None:
        """Reads the result of the last step. Waits until the device has done that step, but not for later work.

        Raises:
            NonFiniteError: a value wasn't finite. Names the processes and the first bad step, at every later call too.
            SpikeError: a spike ends the run; raised at every later call too.
        """
        if self._end is None and self._pending is not None:
            (step, host, limits, event), self._pending = self._pending, None
            if event is not None:
                event.synchronize()  # host sync: waits for the last step while this one is queued
            try:
                self._settle(step, host.tolist(), limits)  # already in host memory
            except (NonFiniteError, SpikeError) as error:
                self._end = error
        if self._end is not None:  # at every call: later steps must not look successful
            raise self._end

    def _settle(self, step: int, judged: list[float], limits: Limits) -> bool:
        """Returns whether the step is left out, and notes whether a process was asked to stop."""
        (loss, self.norm), flat = judged[:2], judged[2:]
        width = len(flat) // self._world.size
        rows = [flat[first : first + width] for first in range(0, len(flat), width)]
        self.leaving = self.leaving or any(row[-1] for row in rows)
        problem = _problem([row[:-1] for row in rows])
        if problem is None:
            return self.judge.see(step, loss, self.norm if width > 2 else None, limits)
        if self.judge.forgives(step, f"step {step}: {problem}"):
            return True
        raise self.refusal(step, problem)

    def refusal(self, step: int, problem: str) -> NonFiniteError:
        """Returns the error of a step that isn't finite."""
        return NonFiniteError(f"step {step}: {problem}. {self.judge.nothing_moved(step, REMEDY)}", step)


def _problem(values: list[list[float]]) -> str | None:
    """Returns which processes' values aren't finite, or None."""
    bad = [(rank, row[0]) for rank, row in enumerate(values) if not _finite(row[0])]
    if bad:
        which = ", ".join(f"process {rank} has loss {value}" for rank, value in bad)
        return f"{which}; expected finite losses"
    bad_ranks = [rank for rank, row in enumerate(values) if not all(map(_finite, row))]
    if bad_ranks:
        value = values[bad_ranks[0]][-1]
        return f"the gradient norm is {value} on processes {bad_ranks} though every loss is finite"
    return None


def _finite(value: float) -> bool:
    return value - value == 0.0
