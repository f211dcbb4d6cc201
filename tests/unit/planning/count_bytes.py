"""Counts the bytes of tensors: those that autograd keeps for backward, and the peak of those allocated."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def saved_bytes(run: Callable[[], Any], *, without: list[Tensor]) -> tuple[int, Any]:
    """Returns the bytes of the distinct storages that `run` saves for backward, and its result.

    Ignores the storages of the tensors in `without`, such as parameters and inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    return sum(found.values()), output


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate while it is active: `live` now, `peak` at most.

    Ignores memory that an operation only uses internally, and the storages of `ignored` tensors.
    """

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in ignored}
        self._followed: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for each in tree_iter(output):
            if isinstance(each, Tensor):
                self._follow(each.untyped_storage())
        return output

    def _follow(self, storage: Any) -> None:
        key = id(storage)
        if key in self._followed or key in self._known:
            return
        size = storage.nbytes()
        self._followed[key] = weakref.finalize(storage, self._drop, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int, size: int) -> None:
        del self._followed[key]
        self.live -= size
