"""Updates the target encoder's tensors. Must not know modules or engines; the engine chooses the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ijepa_kernels.target_update import prepare, target_update


class TargetUpdate:
    """Moves a target towards its source. For the Triton kernel, it caches a table of the tensors' addresses."""

    def __init__(self, implementation: str = "auto") -> None:
        """`implementation` is auto, eager, reference or triton; see `ijepa_kernels.target_update`."""
        self._implementation = implementation
        self._tables: dict[bool, tuple[list[int], Any]] = {}

    @torch.no_grad()
    def __call__(
        self,
        target: list[Tensor],
        source: list[Tensor],
        momentum: float,
        *,
        copies: Sequence[Tensor | None] = (),
        stopped: Tensor | None = None,
    ) -> None:
        """Sets `target` to momentum * target + (1 - momentum) * source, in place and without communication.

        Both are fp32 tensors of equal shapes, in the same order. In bf16 the update would vanish, since 1 - momentum is
        below its resolution (at 0.996, 1000 updates changed nothing). `copies` are the bf16 copies to renew, None for
        tensors without one. If `stopped`, () fp32 on the device, isn't 0, nothing changes. Doesn't synchronise.

        Source: the I-JEPA paper (arXiv 2301.08243), section 3, "Targets".
        """
        assert all(t.dtype == torch.float32 for t in target), "the target's shards must be fp32"
        assert [t.shape for t in target] == [s.shape for s in source], "target and source are sharded differently"
        kept = list(copies) or [None] * len(target)
        for copied in (False, True):
            chosen = [index for index, copy in enumerate(kept) if (copy is not None) == copied]
            lists = [target[index] for index in chosen], [source[index] for index in chosen]
            roundings = [copy for copy in kept if copy is not None] if copied else None
            target_update(
                *lists,
                momentum,
                copies=roundings,
                found_nonfinite=stopped,
                table=self._table(copied, *lists, roundings),
                implementation=self._implementation,
            )

    def _table(self, copied: bool, target: list[Tensor], source: list[Tensor], copies: list[Tensor] | None) -> Any:
        """Returns the kernel's table of these tensors, which is rebuilt only if an address has changed."""
        if self._implementation != "triton" or not target:
            return None
        addresses = [tensor.data_ptr() for tensors in (target, source, copies or []) for tensor in tensors]
        if copied not in self._tables or self._tables[copied][0] != addresses:
            self._tables[copied] = addresses, prepare(target, source, copies)
        return self._tables[copied][1]
