"""Tables of addresses on the device: with one, a Triton kernel works on many tensors in one launch.

The grid covers chunks of all tensors, one after another. One table holds the addresses and size of each tensor, the
other (tensor, first value) of each chunk. Both are made once for a list of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ijepa_kernels.choice import check_device

ALIGNMENT = 16  # bytes that a thread loads at once if all addresses are multiples of it
Column = Sequence[Tensor | None]  # one tensor, or none, of each row


class AddressTable:
    """The addresses of columns of tensors and the chunks that the grid covers, both on the device.

    A row of `tensors`, int64, holds an address of each column (0 where there is no tensor), the number of values of its
    first tensor, and the row's `extra`. A row of `chunks`, int64, is (tensor, first value).
    """

    def __init__(
        self, kernel: str, columns: Sequence[Column], lengths: Sequence[int], extra: Sequence[Sequence[int]] = ()
    ) -> None:
        """`lengths` are the values of a chunk of each tensor.

        Raises:
            ValueError: the tensors are where Triton can't run.
        """
        first = [tensor for tensor in columns[0] if tensor is not None]
        device = first[0].device
        check_device(kernel, device, "eager")
        self.addresses = addresses(columns)
        sizes = [tensor.numel() for tensor in first]
        chunks = [
            (index, begin)
            for index, (size, length) in enumerate(zip(sizes, lengths, strict=True))
            for begin in range(0, size, length)
        ]
        more = extra or [()] * len(sizes)
        rows = [(*row, size, *rest) for row, size, rest in zip(self.addresses, sizes, more, strict=True)]
        self.num_chunks = len(chunks)
        self.tensors = to_device(torch.tensor(rows, dtype=torch.int64), device)
        self.chunks = to_device(torch.tensor(chunks, dtype=torch.int64).reshape(-1, 2), device)

    def check(self, columns: Sequence[Column]) -> None:
        """Checks that the table was made for these tensors.

        Raises:
            ValueError: it wasn't: the kernel would write to memory that isn't theirs.
        """
        if addresses(columns) != self.addresses:
            raise ValueError("the table was made for other tensors, or they have moved; call prepare again with these")


def addresses(columns: Sequence[Column]) -> list[tuple[int, ...]]:
    """Returns the addresses of each row; 0 where a column has no tensor."""
    found = [[0 if tensor is None else tensor.data_ptr() for tensor in column] for column in columns]
    return list(zip(*found, strict=True))


def aligned(rows: Sequence[Sequence[int]]) -> bool:
    """Returns whether all numbers, addresses or sizes, are multiples of a wide load."""
    return all(number % ALIGNMENT == 0 for row in rows for number in row)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`; copies through pinned memory on CUDA, so that nothing waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
