"""The copy of a batch to a GPU, with CUDA replaced by stand-ins: what the host must not wait for is page-locked."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from ijepa_scale.data.batch import Batch
from ijepa_scale.data.feed import DeviceFeed
from ijepa_scale.data.slots import Slots


class Event:
    def record(self, stream: object) -> None:
        pass


def test_labels_are_page_locked_before_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels lie in a page-locked buffer. A copy from pageable memory makes the host wait for the stream."""
    locked, copied = set(), []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        own = tensor.clone()
        locked.add(own.data_ptr())
        return own

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copied.append((tensor.dtype, non_blocking, tensor.data_ptr() in locked))
        return tensor

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    slots = Slots(1, 12)
    batch = Batch(
        pixels=slots.tensor(0, 12),
        sizes=np.array([[2, 2]]),
        sample_ids=np.arange(1),
        labels=torch.tensor([3]),
        step=0,
        epoch=0,
        position=0,
    )
    DeviceFeed(slots, torch.device("cpu"))._copy(0, batch, None)  # type: ignore[arg-type]
    assert copied == [(torch.uint8, True, False), (torch.int64, True, True)]
