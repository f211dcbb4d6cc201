"""Packed attention without a variable-length kernel: SDPA over runs of equally long sequences. Floor 1."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_by_runs(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """Returns block-diagonal attention of (total, heads, head_dim) tensors; one SDPA call per (count, length) run."""
    sizes = [count * length for count, length in runs]
    pieces = []
    for (count, length), one_q, one_k, one_v in zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        dense = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (one_q, one_k, one_v))
        pieces.append(F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces) if pieces else v


@torch.library.custom_op("ijepa_kernels::attention_by_runs", mutates_args=())
def opaque_attention_by_runs(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Returns `attention_by_runs` as one operation, which torch.compile doesn't specialise to the lengths.

    Reads `cu_seqlens` on the host: free on the CPU, a synchronisation on CUDA (where only fp32 comes here).
    Gradients are summed in fp32.
    """
    return attention_by_runs(q, k, v, _runs_of(cu_seqlens)).contiguous()


@opaque_attention_by_runs.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("ijepa_kernels::attention_by_runs_backward", mutates_args=())
def _opaque_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v from recomputed weights: autograd isn't at hand inside an operation."""
    pieces: list[list[Tensor]] = [[], [], []]
    runs = _runs_of(cu_seqlens)
    sizes = [count * length for count, length in runs]
    for run, *rows in zip(runs, *(x.split(sizes) for x in (gradient, q, k, v)), strict=True):
        upstream, one_q, one_k, one_v = (x.unflatten(0, run).transpose(1, 2).float() for x in rows)
        scale = q.shape[-1] ** -0.5
        weights = (one_q @ one_k.mT * scale).softmax(dim=-1)
        d_weights = upstream @ one_v.mT
        d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) * scale
        for piece, result in zip(pieces, (d_scores @ one_k, d_scores.mT @ one_q, weights.mT @ upstream), strict=True):
            piece.append(result.transpose(1, 2).flatten(0, 1).to(q.dtype))
    dq, dk, dv = (torch.cat(piece) if piece else torch.zeros_like(q) for piece in pieces)
    return dq, dk, dv


@_opaque_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    return *_opaque_backward(gradient, *ctx.saved_tensors), None


opaque_attention_by_runs.register_autograd(_backward, setup_context=_save_inputs)


def _runs_of(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    lengths = cu_seqlens.diff().tolist()  # host sync on CUDA
    return [(len(list(group)), length) for length, group in groupby(lengths)]
