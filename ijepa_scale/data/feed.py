"""Hands out free buffers and copies their content to the device while the device computes."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.data.slots import Slots


class DeviceFeed:
    """Delivers batches on a device and reclaims their buffers when nothing reads them any more.

    On the CPU a batch is a view of the buffer, valid until the next one is asked for. On a CUDA device the buffers
    are page-locked, and each batch is copied on a separate stream during the computation on the previous one; a
    buffer is free when its copy is done.
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
        """Returns a free buffer; if there is none, waits for the oldest copy."""
        while self._copying and (not self._free or self._copying[0][0].query()):
            event, slot = self._copying.popleft()
            event.synchronize()  # host sync, with a copy that was started at least a step ago
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
        """Starts the copy of a batch to the device."""
        # the pixels are in a page-locked buffer; a copy of labels from pageable memory would wait for the stream
        batch = dataclasses.replace(batch, labels=batch.labels.pin_memory())
        with torch.cuda.stream(stream):
            copied = batch.to(self._device)
            done = torch.cuda.Event()
            done.record(stream)
        self._copying.append((done, slot))
        return done, copied

    def _arrived(self, done: torch.cuda.Event, batch: Batch) -> Batch:
        """Returns the batch after making the current stream, but not the host, wait for its copy."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in (batch.pixels, batch.labels):
            tensor.record_stream(current)
        return batch
