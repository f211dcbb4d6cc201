"""The layout of a packed tensor: where its sequences of different lengths begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """The lengths of the sequences that follow one another along a packed token dimension.

    `lengths` is on the host, so reading it never synchronises. `cu_seqlens` (S + 1,) int32 is on the device, as
    variable-length attention kernels expect it.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    bound: int = 0  # a power of two >= the longest length; it rarely changes, so kernels may specialise to it

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
        """Returns the number of tokens of all sequences together."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Returns the number of tokens of the longest sequence; 0 if there is none."""
        return max(self.lengths, default=0)

    def map(self, change: Callable[[Tensor], Tensor]) -> SequenceLayout:
        """Returns the same layout with `change` applied to `cu_seqlens`, such as a move to a device."""
        return SequenceLayout(self.lengths, change(self.cu_seqlens))


def check_paired(queries: SequenceLayout, keys: SequenceLayout) -> None:
    """Checks that both layouts describe the same sequences, on the host.

    Raises:
        ValueError: the layouts hold different numbers of sequences.
    """
    if len(queries.lengths) != len(keys.lengths):
        raise ValueError(
            f"{len(queries.lengths)} sequences of queries but {len(keys.lengths)} of keys; "
            "pass layouts of the same sequences"
        )


def runs_of(queries: Sequence[int], keys: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns (count, query length, key length) for each run of equal pairs of lengths, in order."""
    return [(len(list(group)), *pair) for pair, group in groupby(zip(queries, keys, strict=True))]
