"""Writes checkpoints while training goes on, from a copy of the state in host memory. One at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ijepa_scale.checkpoint.writing import parts_to_write, write_parts
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.host_memory import host_bytes

logger = logging.getLogger(__name__)


class BackgroundSaves:
    """Copies what this process saves into host memory, and writes it in a thread.

    The thread's collectives run in a process group of their own, so they can't meet those of the training. The memory
    is kept from the first save on, and page-locked if the state is on a GPU.
    """

    def __init__(self, world: World) -> None:
        """Communicates: every process must call it."""
        self._training, self._world = world, world.apart()
        self._memory: Tensor | None = None
        self._locked = False
        self._refused = False  # too little host memory
        self._thread = ThreadPoolExecutor(1, "saving", partial(_use, world.device))
        self._running: Future[Path] | None = None

    def start(
        self,
        folder: Path,
        step: int,
        pieces: Iterable[Piece],
        *,
        ended: Callable[[Future[Path]], None],
        **options: Any,
    ) -> None:
        """Begins what `save` does. Returns when the state is copied, or on a GPU when the copy is queued.

        `ended` is called in the thread when it is done. Communicates at the first call. The last save must have been
        waited for.
        """
        assert self._running is None, "two saves at once"
        parts = parts_to_write(pieces)
        self._reserve(sum(part.tensor.numel() for part in parts))
        copied, copy_ended = (parts, None) if self._memory is None else self._copy(parts, self._memory)

        def write() -> Path:
            if copy_ended is not None:
                copy_ended.synchronize()  # in this thread: the training's host doesn't wait
            return write_parts(folder, step, copied, world=self._world, **options)

        self._running = self._thread.submit(write)
        self._running.add_done_callback(ended)
        if self._memory is None:
            wait([self._running])

    def close(self) -> None:
        """Waits for the save that was begun, if any, and frees the host memory. Raises nothing."""
        self._thread.shutdown()
        if self._locked and self._memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._locked = None, False

    def wait(self) -> Path | None:
        """Waits for the save that was begun, if any, and returns its path.

        Raises:
            SaveError: it couldn't be written; raised on every process.
        """
        running, self._running = self._running, None
        return None if running is None else running.result()

    @property
    def is_running(self) -> bool:
        """Whether a save isn't done yet. Processes may differ."""
        return self._running is not None and not self._running.done()

    def _reserve(self, elements: int) -> None:
        """Reserves the host memory, once. If a host hasn't as much, all processes write from the state itself."""
        if self._refused or (self._memory is not None and self._memory.numel() >= elements):
            return
        world, room, self._memory = self._training, host_bytes(), None
        needed = 4 * elements * world.local_size
        tightest = min(world.gather_objects((room - needed, room, needed)))  # type: ignore[type-var]
        if tightest[0] < 0:  # type: ignore[index]
            self._refused = True
            if world.is_main:
                logger.warning(
                    "a host has %.2f GB of memory left, but copies of the state for saving it while training goes on "
                    "take %.2f GB: training waits for each save; give the job more memory, or say so with "
                    "checkpoint.asynchronous=false", *(value / 1e9 for value in tightest[1:]),  # type: ignore[index]
                )  # fmt: skip
            return
        self._memory = torch.empty(elements)  # PyTorch's page-locked memory comes in powers of two
        if world.device.type == "cuda" and elements:
            code = int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0))
            self._locked = not code
            if code:
                with contextlib.suppress(RuntimeError):  # the next kernel would raise the error of that call
                    torch.zeros((), device=world.device)
                logger.warning(
                    "process %d: %.2f GB can't be page-locked (CUDA error %d), so training waits for the copies of "
                    "its state; raise ulimit -l", world.rank, self._memory.nbytes / 1e9, code,
                )  # fmt: skip

    @staticmethod
    def _copy(parts: list[Piece], memory: Tensor) -> tuple[list[Piece], torch.cuda.Event | None]:
        copied, offset, event = [], 0, None
        for part in parts:
            place = memory[offset : offset + part.tensor.numel()]
            place.copy_(part.tensor, non_blocking=True)
            copied.append(replace(part, tensor=place))
            offset += part.tensor.numel()
        if any(part.tensor.is_cuda for part in parts):
            event = torch.cuda.Event()
            event.record()
        return copied, event


def _use(device: torch.device) -> None:
    """Lets a new thread use the process's GPU, since it begins with the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
