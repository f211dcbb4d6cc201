"""The target's update of all tensors in one launch, which writes the bf16 copies in the same pass.

`ijepa_kernels.addresses` makes the tables that locate the tensors and their chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels.addresses import AddressTable, aligned

CHUNK, BLOCK = 16384, 2048  # values per program, and values at a time
Lists = tuple[list[Tensor], list[Tensor], list[Tensor] | None]


@triton.jit
def moved_towards(old, new, weight):
    """Returns old + weight * (new - old), computed from the nearer end, as `torch.lerp` does."""
    difference = new - old
    return tl.where(weight < 0.5, old + weight * difference, new - (1.0 - weight) * difference)


@triton.jit
def _move(target, source, copy, offsets, inside, weight, moving, COPIES: tl.constexpr, FLAG: tl.constexpr):
    """Moves the values at `offsets`; `inside` is their mask, or None."""
    old = tl.load(target + offsets, mask=inside)
    moved = moved_towards(old, tl.load(source + offsets, mask=inside), weight)
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


class Table(AddressTable):
    """The addresses of an update's tensors and the chunks that the grid covers, both on the device."""

    def __init__(self, target: list[Tensor], source: list[Tensor], copies: list[Tensor] | None) -> None:
        super().__init__("target_update", _columns((target, source, copies)), [CHUNK] * len(target))
        self.aligned, self.has_copies = aligned(self.addresses), copies is not None


def target_update(table: Table, lists: Lists, momentum: float, found_nonfinite: Tensor | None) -> None:
    """Runs the kernel over the table's tensors, which have been checked.

    Raises:
        ValueError: the table belongs to other tensors.
    """
    table.check(_columns(lists))
    if not table.num_chunks:
        return
    _kernel[(table.num_chunks,)](
        table.tensors, table.chunks, found_nonfinite, 1.0 - momentum,
        COPIES=table.has_copies, FLAG=found_nonfinite is not None, ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip


def _columns(lists: Lists) -> tuple[Sequence[Tensor | None], ...]:
    target, source, copies = lists
    return target, source, [None] * len(target) if copies is None else copies
