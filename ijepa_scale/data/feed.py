"""Hands out buffers, and brings what is in them to the device beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.data.slots import Slots


class DeviceFeed:
    """Delivers batches on a device and takes their buffers back when nothing reads them any more.

    On the CPU a batch is the buffer itself, until the next one is asked for. On a CUDA device the buffers are
    page-locked, and each batch is copied on a stream of its own while the one before is computed with; a buffer
    is free when its copy is done.
    """

    def __init__(self, slots: Slots, device: torch.device) -> None:
        self._free = deque(range(slots.count))
        self._copying: deque[tuple[torch.cuda.Event, int]] = deque()
        self._device = device
        self._stream = None
        if device.type == "cuda":
            slots.pin()
            self._stream = torch.cuda.Stream(device)

    def take(self) -> int:
        """Returns a free buffer; waits for the oldest copy where there is none."""
        while self._copying and (not self._free or self._copying[0][0].query()):
            event, slot = self._copying.popleft()
            event.synchronize()  # host sync, of a copy that was begun a step or more ago
            self._free.append(slot)
        return self._free.popleft()

    def deliver(self, filled: Iterable[tuple[int, Batch]]) -> Iterator[Batch]:
        """Yields the batches on the device, in order."""
        if self._stream is None:
            for slot, batch in filled:
                yield batch
                self._free.append(slot)
            return
        ahead = None
        for slot, batch in filled:
            copied = self._copy(slot, batch, self._stream)
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = copied
        if ahead is not None:
            yield self._arrived(*ahead)

    def _copy(self, slot: int, batch: Batch, stream: torch.cuda.Stream) -> tuple[torch.cuda.Event, Batch]:
        """Begins the copy of a batch."""
        with torch.cuda.stream(stream):
            copied = batch.to(self._device)
            done = torch.cuda.Event()
            done.record(stream)
        self._copying.append((done, slot))
        return done, copied

    def _arrived(self, done: torch.cuda.Event, batch: Batch) -> Batch:
        """Returns the batch for the current stream, which waits for its copy; the host doesn't."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in (batch.pixels, batch.labels):
            tensor.record_stream(current)
        return batch
