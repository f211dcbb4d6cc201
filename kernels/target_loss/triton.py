"""Gather, norm, loss and the prediction's gradient in one pass: every value is read once, the gradient written once.

A program loads a few whole rows into registers. It writes the gradient for an upstream gradient of 1 and one partial
loss per row; a small sum over the rows follows. Nothing is atomic, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels.choice import check_device
from ijepa_kernels.rows import check_width, tile

_SCALED = 4096  # gradient values that one program scales


@triton.jit
def _kernel(
    prediction, tokens, lookup, weights, gradient, partials,
    num_rows, num_tokens, width, prediction_stride, token_stride, beta, eps, even_weight,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    here = rows < num_rows
    inside = here[:, None] & (columns < width)[None, :]
    token = tl.load(lookup + rows, mask=here, other=0)
    known = (token >= 0) & (token < num_tokens)  # an index out of range reads nothing and gives NaN
    pointers = tokens + token[:, None] * token_stride + columns[None, :]
    value = tl.load(pointers, mask=inside & known[:, None], other=float("nan")).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    mean = tl.sum(value, axis=1) / width
    centred = tl.where(inside, value - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    target = centred * (1.0 / tl.sqrt(variance + eps))[:, None]

    pointers = prediction + rows[:, None] * prediction_stride + columns[None, :]
    off = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) - target
    if SMOOTH:
        size = tl.abs(off)
        element = tl.where(size < beta, 0.5 * off * off / beta, size - 0.5 * beta)
        slope = tl.where(off >= beta, 1.0, tl.where(off <= -beta, -1.0, off / beta))  # NaN stays NaN
    else:
        element = off * off
        slope = 2.0 * off
    if WEIGHTED:
        weight = tl.load(weights + rows, mask=here, other=0.0) / width
    else:
        weight = tl.where(here, even_weight / width, 0.0)
    tl.store(partials + rows, tl.sum(tl.where(inside, element, 0.0), axis=1) * weight, mask=here)
    if GRADIENT:
        out = gradient + rows[:, None] * width + columns[None, :]
        tl.store(out, (slope * weight[:, None]).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(gradient, upstream, count, BLOCK: tl.constexpr):
    factor = tl.load(upstream)
    if factor != 1.0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + offsets, mask=offsets < count, other=0.0).to(tl.float32)
        tl.store(gradient + offsets, (value * factor).to(gradient.dtype.element_ty), mask=offsets < count)


@torch.library.custom_op("ijepa_kernels::target_loss", mutates_args=())
def _forward(
    prediction: Tensor,
    tokens: Tensor,
    lookup: Tensor,
    weights: Tensor | None,
    beta: float,
    eps: float,
    smooth: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the loss () fp32 and, `with_gradient`, the prediction's gradient for an upstream gradient of 1."""
    check_device("target_loss", prediction.device, "reference")  # checked here because torch.compile can't trace it
    rows, width = prediction.shape
    prediction, tokens = (x if x.stride(1) == 1 else x.contiguous() for x in (prediction, tokens))
    gradient = prediction.new_empty((rows, width) if with_gradient else (0, width))
    partials = torch.empty(rows, dtype=torch.float32, device=prediction.device)
    if rows:
        options = tile(width)
        _kernel[(triton.cdiv(rows, options["ROWS"]),)](
            prediction, tokens, lookup.contiguous(), None if weights is None else weights.contiguous(),
            gradient, partials, rows, tokens.shape[0], width, prediction.stride(0), tokens.stride(0),
            beta, eps, 1.0 / rows, WEIGHTED=weights is not None, SMOOTH=smooth, GRADIENT=with_gradient, **options,
        )  # fmt: skip
    return partials.sum(), gradient


@_forward.register_fake
def _(prediction, tokens, lookup, weights, beta, eps, smooth, with_gradient):  # noqa: ANN001, ANN202
    shape = prediction.shape if with_gradient else (0, prediction.shape[1])
    return prediction.new_empty((), dtype=torch.float32), prediction.new_empty(shape)


@torch.library.custom_op("ijepa_kernels::target_loss_scale", mutates_args=("gradient",))
def _scale(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies the gradient by the scalar in place; does nothing if the scalar is 1."""
    if gradient.numel():
        _scale_kernel[(triton.cdiv(gradient.numel(), _SCALED),)](gradient, upstream, gradient.numel(), BLOCK=_SCALED)


@_scale.register_fake
def _(gradient, upstream) -> None:  # noqa: ANN001
    return None


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, upstream: Tensor, _) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    (gradient,) = ctx.saved_tensors
    _scale(gradient, upstream)  # in place: autograd itself refuses a second backward through the graph
    return gradient, *(None,) * 7


_forward.register_autograd(_backward, setup_context=_save)


def target_loss(
    prediction: Tensor,
    tokens: Tensor,
    lookup: Tensor,
    weights: Tensor | None = None,
    *,
    beta: float = 1.0,
    eps: float = 1e-5,
    loss: str = "smooth_l1",
) -> Tensor:
    """Returns the loss, () fp32, for checked arguments. Copies inputs whose rows aren't contiguous.

    Raises:
        ValueError: rows are wider than a program holds, or tensors aren't on CUDA.
    """
    check_width(prediction.shape[1])
    with_gradient = torch.is_grad_enabled() and prediction.requires_grad
    return _forward(prediction, tokens.detach(), lookup, weights, beta, eps, loss == "smooth_l1", with_gradient)[0]
