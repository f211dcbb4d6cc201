"""Where sequences of different lengths begin and end in a packed tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Lengths of the sequences that lie one after another along a packed token dimension.

    `lengths` lives on the host, so nothing that reads it synchronises; `cu_seqlens` (S + 1,) int32
    lives on the device, as variable-length attention kernels want it.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    bound: int = 0  # power of two, at least the longest length: changes so rarely that kernels may specialise to it

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", 1 << max(0, self.longest - 1).bit_length())

    @classmethod
    def of(cls, lengths: tuple[int, ...] | list[int], device: torch.device | str = "cpu") -> SequenceLayout:
        """Returns the layout of sequences of these lengths (each at least 1)."""
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return cls(tuple(map(int, lengths)), bounds.to(device, non_blocking=True))

    @property
    def total(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 where there is none."""
        return max(self.lengths, default=0)

    def map(self, change: Callable[[Tensor], Tensor]) -> SequenceLayout:
        """Returns the same layout with `change` applied to `cu_seqlens`, such as a move to a device."""
        return SequenceLayout(self.lengths, change(self.cu_seqlens))


def check_paired(queries: SequenceLayout, keys: SequenceLayout) -> None:
    """Refuses layouts of other sequences. Reads the host only.

    Raises:
        ValueError: the layouts hold different numbers of sequences.
    """
    if len(queries.lengths) != len(keys.lengths):
        raise ValueError(
            f"{len(queries.lengths)} sequences of queries but {len(keys.lengths)} of keys; "
            "pass layouts of the same sequences"
        )


def runs_of(queries: Sequence[int], keys: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns (count, query length, key length) of consecutive equal pairs of lengths, in order."""
    return [(len(list(group)), *pair) for pair, group in groupby(zip(queries, keys, strict=True))]
