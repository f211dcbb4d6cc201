"""The tail of a step in one launch, which reads and writes each weight once; a small launch before it counts the steps.

The grid covers chunks of all weights, located by `ijepa_kernels.addresses`. A chunk of a weight whose target has an fp8
copy is one row, since the row's scale needs all of its values: the program writes the moved row, then reads it again
from the cache to quantise it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels.addresses import AddressTable, addresses, aligned, to_device
from ijepa_kernels.target_update.triton import moved_towards

if TYPE_CHECKING:
    from ijepa_kernels.fused_tail import Rates, Weight

CHUNK, BLOCK, WARPS = 16384, 1024, 4  # values per program, values at a time, warps
COUNTED = 256  # weights that a program of the first launch counts
# A row of the table has 12 columns: value, exp_avg, exp_avg_sq, target, copy, target_copy, quantised, scales, step, and
# then the number of values (9), values of a chunk (10) and the group (11). A group and a weight have 8 numbers each.


@triton.jit
def _count_kernel(tensors, rates, factors, flag, num, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the step of each weight, and writes the factors of its update, computed in fp64, as fp32."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num
    row = tensors + 12 * index
    counter = tl.load(row + 8, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    rate = rates + 8 * tl.load(row + 11, mask=inside, other=0)
    step = tl.load(counter, mask=inside, other=0.0)
    if FLAG:
        step += tl.where(tl.load(flag) == 0.0, 1.0, 0.0)
    else:
        step += 1.0
    tl.store(counter, step, mask=inside)
    lr, weight_decay = tl.load(rate), tl.load(rate + 1)
    beta1, beta2 = tl.load(rate + 2), tl.load(rate + 3)
    wide = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(wide * tl.load(rate + 4))
    correction2 = 1.0 - tl.exp(wide * tl.load(rate + 5))
    factor = factors + 8 * index
    tl.store(factor, (1.0 - lr * weight_decay).to(tl.float32), mask=inside)
    tl.store(factor + 1, beta1.to(tl.float32), mask=inside)
    tl.store(factor + 2, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(factor + 3, beta2.to(tl.float32), mask=inside)
    tl.store(factor + 4, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(factor + 5, (lr / correction1).to(tl.float32), mask=inside)
    tl.store(factor + 6, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=inside)
    tl.store(factor + 7, tl.load(rate + 6).to(tl.float32), mask=inside)


@triton.jit
def _move(pointers, held, offsets, inside, factors, scale, weight, EMA: tl.constexpr):
    """Moves the values at `offsets`; `inside` is their mask, or None. Returns the magnitudes of the moved target."""
    value, gradient, exp_avg, exp_avg_sq, target, copy, target_copy = pointers
    has_target, has_copy, has_target_copy = held
    decay, beta1, rest1, beta2, rest2, step_size, inverse_root, eps = factors
    if inside is not None:
        has_target, has_copy, has_target_copy = inside & has_target, inside & has_copy, inside & has_target_copy
    old = tl.load(value + offsets, mask=inside)
    g = tl.load(gradient + offsets, mask=inside)
    m = tl.load(exp_avg + offsets, mask=inside)
    v = tl.load(exp_avg_sq + offsets, mask=inside)
    if EMA:  # a mask, not a branch: the load doesn't wait for the others
        behind = tl.load(target + offsets, mask=has_target, other=0.0)
    g *= scale
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    new = old * decay - step_size * m / (tl.sqrt_rn(v) * inverse_root + eps)
    tl.store(value + offsets, new, mask=inside)
    tl.store(exp_avg + offsets, m, mask=inside)
    tl.store(exp_avg_sq + offsets, v, mask=inside)
    tl.store(copy + offsets, new.to(tl.bfloat16), mask=has_copy)
    magnitudes = tl.zeros_like(old)
    if EMA:
        moved = moved_towards(behind, new, weight)
        tl.store(target + offsets, moved, mask=has_target)
        tl.store(target_copy + offsets, moved.to(tl.bfloat16), mask=has_target_copy)
        magnitudes = tl.abs(moved) if inside is None else tl.where(inside, tl.abs(moved), 0.0)
    return magnitudes


@triton.jit
def _kernel(
    tensors, chunks, gradients, factors, flag, gradient_scale, weight,
    EMA: tl.constexpr, QUANTISED: tl.constexpr, FLAG: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    moving = True
    if FLAG:
        moving = tl.load(flag) == 0.0
    if moving:
        chunk = tl.program_id(0).to(tl.int64)
        index = tl.load(chunks + 2 * chunk)
        begin = tl.load(chunks + 2 * chunk + 1)
        row = tensors + 12 * index
        length = tl.minimum(tl.load(row + 10), tl.load(row + 9) - begin).to(tl.int32)
        value = tl.load(row).to(tl.pointer_type(tl.float32)) + begin
        gradient = tl.load(gradients + index).to(tl.pointer_type(tl.float32)) + begin
        exp_avg = tl.load(row + 1).to(tl.pointer_type(tl.float32)) + begin
        exp_avg_sq = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + begin
        has_target, has_copy, has_target_copy = tl.load(row + 3) != 0, tl.load(row + 4) != 0, tl.load(row + 5) != 0
        target = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + begin
        copy = tl.load(row + 4).to(tl.pointer_type(tl.bfloat16)) + begin
        target_copy = tl.load(row + 5).to(tl.pointer_type(tl.bfloat16)) + begin
        if ALIGNED:  # addresses are multiples of 16, and so are the beginnings of chunks
            value, gradient = tl.multiple_of(value, 16), tl.multiple_of(gradient, 16)
            exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
            target, copy = tl.multiple_of(target, 16), tl.multiple_of(copy, 16)
            target_copy = tl.multiple_of(target_copy, 16)
        if EVEN:  # sizes too: then masks don't narrow loads, and the code takes fewer registers
            length = tl.multiple_of(length, 16)
        factor = factors + 8 * index
        numbers = (
            tl.load(factor), tl.load(factor + 1), tl.load(factor + 2), tl.load(factor + 3),
            tl.load(factor + 4), tl.load(factor + 5), tl.load(factor + 6), tl.load(factor + 7),
        )  # fmt: skip
        scale = 1.0
        if SCALED:
            scale = tl.load(gradient_scale)
        pointers = (value, gradient, exp_avg, exp_avg_sq, target, copy, target_copy)
        held = (has_target, has_copy, has_target_copy)
        columns = tl.arange(0, BLOCK)
        largest = tl.zeros((BLOCK,), dtype=tl.float32)
        start = 0  # `while`, since the interpreter takes no bound of `range` from memory
        while start + BLOCK <= length:  # without a mask: a mask of unknown length would keep loads narrow
            largest = tl.maximum(largest, _move(pointers, held, start + columns, None, numbers, scale, weight, EMA))
            start += BLOCK
        if start < length:
            inside = start + columns < length
            largest = tl.maximum(largest, _move(pointers, held, start + columns, inside, numbers, scale, weight, EMA))
        if QUANTISED:
            if tl.load(row + 6) != 0:
                quantised = tl.load(row + 6).to(tl.pointer_type(tl.float8e4nv)) + begin
                scales = tl.load(row + 7).to(tl.pointer_type(tl.float32)) + begin // tl.load(row + 10)
                if ALIGNED:
                    quantised = tl.multiple_of(quantised, 16)
                fp8_scale = tl.div_rn(tl.maximum(tl.max(largest, axis=0), 1e-12), 448.0)  # as quantise_rows
                tl.store(scales, fp8_scale)
                tl.debug_barrier()  # other threads may have written what a thread reads now
                start = 0
                while start < length:
                    inside = start + columns < length
                    moved = tl.load(target + start + columns, mask=inside)
                    shrunk = tl.div_rn(moved, tl.zeros_like(moved) + fp8_scale)
                    tl.store(quantised + start + columns, shrunk.to(tl.float8e4nv), mask=inside)
                    start += BLOCK


class Table(AddressTable):
    """The addresses of the weights, their states and copies, and the chunks that the grid covers, on the device."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        lengths = [CHUNK if weight.quantised is None else weight.value.shape[1] for weight in weights]
        extra = [(length, weight.group) for length, weight in zip(lengths, weights, strict=True)]
        super().__init__("fused_tail", _columns(weights), lengths, extra)
        self.aligned = aligned([row[:7] for row in self.addresses]) and aligned([lengths])
        self.even = aligned([[weight.value.numel() for weight in weights], lengths])
        self.has_quantised = any(weight.quantised is not None for weight in weights)
        self.num_weights = len(weights)
        self.factors = torch.empty(len(weights), 8, device=weights[0].value.device)
        self._gradients: tuple[list[tuple[int, ...]], Tensor] | None = None

    def gradients(self, weights: Sequence[Weight]) -> tuple[Tensor, bool]:
        """Returns the gradients' addresses (T,) int64 on the device, and if they allow wide loads.

        Sends them only if they have changed; with PyTorch's allocator, most steps find them where they were.
        """
        found = addresses([[weight.gradient for weight in weights]])
        if self._gradients is None or self._gradients[0] != found:
            self._gradients = found, to_device(torch.tensor(found, dtype=torch.int64), self.tensors.device)
        return self._gradients[1], aligned(found)


def fused_tail(
    table: Table,
    weights: Sequence[Weight],
    rates: Sequence[Rates],
    *,
    momentum: float | None,
    stopped: Tensor | None,
    gradient_scale: Tensor | None,
) -> None:
    """Runs both kernels over the table's weights, which have been checked.

    Raises:
        ValueError: the table belongs to other tensors.
    """
    table.check(_columns(weights))
    gradients, gradients_aligned = table.gradients(weights)
    numbers = torch.tensor([_numbers(rate) for rate in rates], dtype=torch.float64)
    _count_kernel[(-(-table.num_weights // COUNTED),)](
        table.tensors, to_device(numbers, table.tensors.device), table.factors, stopped, table.num_weights,
        FLAG=stopped is not None, BLOCK=COUNTED, num_warps=4,
    )  # fmt: skip
    if not table.num_chunks:
        return
    _kernel[(table.num_chunks,)](
        table.tensors, table.chunks, gradients, table.factors, stopped, gradient_scale,
        1.0 if momentum is None else 1.0 - momentum, EMA=momentum is not None, QUANTISED=table.has_quantised,
        FLAG=stopped is not None, SCALED=gradient_scale is not None, ALIGNED=table.aligned and gradients_aligned,
        EVEN=table.even, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _columns(weights: Sequence[Weight]) -> list[list[Tensor | None]]:
    pairs = [weight.quantised or (None, None) for weight in weights]
    columns = [
        (w.value, w.exp_avg, w.exp_avg_sq, w.target, w.copy, w.target_copy, *pair, w.step)
        for w, pair in zip(weights, pairs, strict=True)
    ]
    return [list(column) for column in zip(*columns, strict=True)]


def _numbers(rate: Rates) -> list[float]:
    """Returns what the first launch reads of a group: 8 numbers, with the logarithms of both betas."""
    logarithms = [math.log(beta) if beta else -math.inf for beta in rate.betas]
    return [rate.lr, rate.weight_decay, *rate.betas, *logarithms, rate.eps, 0.0]
