"""The affine layer norm in one pass forward and one backward; the result is written in the requested dtype.

A program holds whole rows. In backward, a fixed number of programs go over the rows, and each sums its share of the
gradients of weight and bias; a small sum over the programs follows. Nothing is atomic, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels.choice import check_device
from ijepa_kernels.rows import check_width, tile

_PROGRAMS = 256  # at most, in the backward pass: a few for each multiprocessor, the same on every GPU


@triton.jit
def _forward_kernel(
    x, weight, bias, out, mean, inverse, num_rows, width, stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    here, across = rows < num_rows, columns < width
    inside = here[:, None] & across[None, :]
    value = tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    centre = tl.sum(value, axis=1) / width
    centred = tl.where(inside, value - centre[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    scale = tl.load(weight + columns, mask=across, other=0.0)
    shift = tl.load(bias + columns, mask=across, other=0.0)
    result = centred * factor[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + rows[:, None] * width + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + rows, centre, mask=here)
    tl.store(inverse + rows, factor, mask=here)


@triton.jit
def _backward_kernel(
    upstream, x, weight, mean, inverse, gradient, partial_weight, partial_bias,
    num_rows, width, upstream_stride, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    across = columns < width
    scale = tl.load(weight + columns, mask=across, other=0.0)[None, :]
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    first = program * ROWS
    while first < num_rows:
        rows = first.to(tl.int64) + tl.arange(0, ROWS)
        here = rows < num_rows
        inside = here[:, None] & across[None, :]
        pointers = upstream + rows[:, None] * upstream_stride + columns[None, :]
        flow = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        centre = tl.load(mean + rows, mask=here, other=0.0)[:, None]
        factor = tl.load(inverse + rows, mask=here, other=0.0)[:, None]
        normal = tl.where(inside, (value - centre) * factor, 0.0)
        weight_sum += tl.sum(flow * normal, axis=0)
        bias_sum += tl.sum(flow, axis=0)
        scaled = flow * scale
        along = tl.sum(scaled * normal, axis=1)[:, None] / width
        level = tl.sum(scaled, axis=1)[:, None] / width
        result = (scaled - level - normal * along) * factor
        tl.store(gradient + rows[:, None] * width + columns[None, :], result.to(gradient.dtype.element_ty), mask=inside)
        first += tl.num_programs(0) * ROWS
    tl.store(partial_weight + program * width + columns, weight_sum, mask=across)
    tl.store(partial_bias + program * width + columns, bias_sum, mask=across)


@torch.library.custom_op("ijepa_kernels::layer_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for x (R, D), the result (R, D), and mean and 1 / sqrt(variance + eps), (R,) fp32 each."""
    check_device("layer_norm", x.device, "reference")  # checked here because torch.compile can't trace the check
    rows, width = x.shape
    x = _with_contiguous_rows(x)
    out = torch.empty((rows, width), dtype=dtype, device=x.device)
    mean, inverse = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows:
        options = tile(width)
        _forward_kernel[(triton.cdiv(rows, options["ROWS"]),)](
            x, weight.contiguous(), bias.contiguous(), out, mean, inverse, rows, width, x.stride(0), eps, **options
        )
    return out, mean, inverse


@_forward.register_fake
def _(x, weight, bias, eps, dtype):  # noqa: ANN001, ANN202
    statistics = [x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=dtype), *statistics


@torch.library.custom_op("ijepa_kernels::layer_norm_backward", mutates_args=())
def _backward(
    upstream: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, in its dtype, and of weight and bias, fp32."""
    rows, width = x.shape
    upstream, x = _with_contiguous_rows(upstream), _with_contiguous_rows(x)
    gradient = x.new_empty((rows, width))
    options = tile(width)
    programs = min(_PROGRAMS, triton.cdiv(rows, options["ROWS"]))
    partial_weight, partial_bias = (torch.empty(programs, width, device=x.device) for _ in range(2))
    if rows:
        _backward_kernel[(programs,)](
            upstream, x, weight.contiguous(), mean, inverse, gradient, partial_weight, partial_bias,
            rows, width, upstream.stride(0), x.stride(0), **options,
        )  # fmt: skip
    return gradient, partial_weight.sum(dim=0), partial_bias.sum(dim=0)


@_backward.register_fake
def _(upstream, x, weight, mean, inverse):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """Returns the tensor with contiguous rows, as a copy if they weren't."""
    return x if x.stride(1) == 1 else x.contiguous()


def _save(ctx, inputs, output) -> None:  # noqa: ANN001
    x, weight, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, *output[1:])


def _gradients(ctx, upstream: Tensor, *_) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    return *_backward(upstream, *ctx.saved_tensors), None, None


_forward.register_autograd(_gradients, setup_context=_save)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the normalised values in `dtype`, for checked arguments. Copies rows that aren't contiguous.

    Raises:
        ValueError: rows are wider than a program holds, or tensors aren't on CUDA.
    """
    check_width(x.shape[-1])
    return _forward(x.reshape(-1, x.shape[-1]), weight, bias, eps, dtype)[0].view(x.shape)
