"""The target's update of all tensors in one launch, which writes the bf16 copies in the same pass.

The grid covers chunks of all tensors, one after another. Two tables on the device, made once for a list of tensors,
locate the chunks: one holds the addresses and size of each tensor, the other (tensor, first value) of each chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels.choice import check_device

CHUNK, BLOCK = 16384, 2048  # values per program, and values at a time
_ALIGNMENT = 16  # bytes that a thread loads at once if all addresses are multiples of it
Lists = tuple[list[Tensor], list[Tensor], list[Tensor] | None]


@triton.jit
def _move(target, source, copy, offsets, inside, weight, moving, COPIES: tl.constexpr, FLAG: tl.constexpr):
    """Moves the values at `offsets`; `inside` is their mask, or None."""
    old = tl.load(target + offsets, mask=inside)
    new = tl.load(source + offsets, mask=inside)
    difference = new - old
    moved = tl.where(weight < 0.5, old + weight * difference, new - (1.0 - weight) * difference)
    if FLAG:
        moved = tl.where(moving, moved, old)
    tl.store(target + offsets, moved, mask=inside)
    if COPIES:
        tl.store(copy + offsets, moved.to(tl.bfloat16), mask=inside)


@triton.jit
def _kernel(
    tensors, chunks, flag, weight,
    COPIES: tl.constexpr, FLAG: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = tensors + 4 * tl.load(chunks + 2 * chunk)
    begin = tl.load(chunks + 2 * chunk + 1)
    target = tl.load(row).to(tl.pointer_type(tl.float32)) + begin
    source = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + begin
    copy = tl.load(row + 2).to(tl.pointer_type(tl.bfloat16)) + begin
    left = tl.load(row + 3) - begin
    if ALIGNED:  # chunks begin at multiples of CHUNK
        target, source, copy = tl.multiple_of(target, 16), tl.multiple_of(source, 16), tl.multiple_of(copy, 16)
    moving = True
    if FLAG:
        moving = tl.load(flag) == 0.0
    if left >= CHUNK:  # whole chunks go without a mask: a mask of unknown length would keep loads narrow
        for step in range(0, CHUNK, BLOCK):
            _move(target, source, copy, step + tl.arange(0, BLOCK), None, weight, moving, COPIES, FLAG)
    else:
        for step in range(0, CHUNK, BLOCK):
            offsets = step + tl.arange(0, BLOCK)
            _move(target, source, copy, offsets, offsets < left, weight, moving, COPIES, FLAG)


class Table:
    """The addresses of an update's tensors and the chunks that the grid covers, both on the device."""

    def __init__(self, target: list[Tensor], source: list[Tensor], copies: list[Tensor] | None) -> None:
        device = target[0].device
        check_device("target_update", device, "eager")
        self.addresses = _addresses((target, source, copies))
        sizes = [x.numel() for x in target]
        chunks = [(index, begin) for index, size in enumerate(sizes) for begin in range(0, size, CHUNK)]
        rows = torch.tensor([(*row, size) for row, size in zip(self.addresses, sizes, strict=True)], dtype=torch.int64)
        self.aligned = not bool((rows[:, :3] % _ALIGNMENT).any())
        self.has_copies = copies is not None
        self.num_chunks = len(chunks)
        self.tensors = _to_device(rows, device)
        self.chunks = _to_device(torch.tensor(chunks, dtype=torch.int64).reshape(-1, 2), device)


def target_update(table: Table, lists: Lists, momentum: float, found_nonfinite: Tensor | None) -> None:
    """Runs the kernel over the table's tensors, which have been checked.

    Raises:
        ValueError: the table belongs to other tensors: the kernel would write to memory that isn't theirs.
    """
    if _addresses(lists) != table.addresses:
        raise ValueError("the table was made for other tensors, or they have moved; call prepare again with these")
    if not table.num_chunks:
        return
    _kernel[(table.num_chunks,)](
        table.tensors, table.chunks, found_nonfinite, 1.0 - momentum,
        COPIES=table.has_copies, FLAG=found_nonfinite is not None, ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip


def _addresses(lists: Lists) -> list[tuple[int, int, int]]:
    """Returns (target, source, copy) addresses of each tensor; the last is 0 if there are no copies."""
    columns = [[0] * len(lists[0]) if tensors is None else [x.data_ptr() for x in tensors] for tensors in lists]
    return list(zip(*columns, strict=True))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`; copies through pinned memory on CUDA, so that nothing waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
