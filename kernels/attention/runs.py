"""Packed attention without a variable-length kernel: SDPA over runs of equally long sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ijepa_kernels.attention.dense import dense_attention
from ijepa_kernels.attention.layout import runs_of


def attention_by_runs(
    q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int, int]], kernel: str | None = None
) -> Tensor:
    """Returns block-diagonal attention of (total, heads, head_dim) tensors.

    Makes one dense call, in `kernel`, for each (count, query length, key length) of `runs`.
    """
    pieces = []
    for queries, keys, one_q, one_k, one_v in _split(runs, (q,), (k, v)):
        dense = [one_q.unflatten(0, queries), one_k.unflatten(0, keys), one_v.unflatten(0, keys)]
        one_q, one_k, one_v = (x.transpose(1, 2) for x in dense)
        out = dense_attention(one_q, one_k, one_v, kernel)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces) if pieces else q


def _split(
    runs: list[tuple[int, int, int]], query_sided: tuple[Tensor, ...], key_sided: tuple[Tensor, ...]
) -> Iterator[tuple[Any, ...]]:
    """Yields, for each run, (count, length) of its queries and of its keys, and its rows of each tensor."""
    shapes = [(count, length) for count, length, _ in runs], [(count, length) for count, _, length in runs]
    sizes = [[count * length for count, length in kind] for kind in shapes]
    parts = [x.split(sizes[0]) for x in query_sided] + [x.split(sizes[1]) for x in key_sided]
    return zip(*shapes, *parts, strict=True)


@torch.library.custom_op("ijepa_kernels::attention_by_runs", mutates_args=())
def opaque_attention_by_runs(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, dense_kernel: str | None = None
) -> Tensor:
    """Returns `attention_by_runs` as one operation, which torch.compile doesn't specialise to the lengths.

    Reads `cu_queries` and `cu_keys` (S + 1,) on the host. That is free on the CPU and a synchronisation on CUDA,
    where only fp32 takes this path. Gradients are summed in fp32.
    """
    out = attention_by_runs(q, k, v, _runs_between(cu_queries, cu_keys), dense_kernel)
    # without tokens `out` is q itself, and an output may not be an input
    return out.contiguous() if len(q) else q.new_empty(q.shape)


@opaque_attention_by_runs.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, dense_kernel: str | None = None) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("ijepa_kernels::attention_by_runs_backward", mutates_args=())
def _opaque_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v from recomputed weights: autograd doesn't work inside an operation."""
    pieces: list[list[Tensor]] = [[], [], []]
    scale = q.shape[-1] ** -0.5
    for queries, keys, *rows in _split(_runs_between(cu_queries, cu_keys), (gradient, q), (k, v)):
        shapes = (queries, queries, keys, keys)
        upstream, one_q, one_k, one_v = (
            x.unflatten(0, shape).transpose(1, 2).float() for x, shape in zip(rows, shapes, strict=True)
        )
        weights = (one_q @ one_k.mT * scale).softmax(dim=-1)
        d_weights = upstream @ one_v.mT
        d_scores = weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) * scale
        for piece, result in zip(pieces, (d_scores @ one_k, d_scores.mT @ one_q, weights.mT @ upstream), strict=True):
            piece.append(result.transpose(1, 2).flatten(0, 1).to(q.dtype))
    dq, dk, dv = (
        torch.cat(piece) if piece else torch.zeros_like(x) for piece, x in zip(pieces, (q, k, v), strict=True)
    )
    return dq, dk, dv


@_opaque_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs[:-1])


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    return *_opaque_backward(gradient, *ctx.saved_tensors), None, None, None


opaque_attention_by_runs.register_autograd(_backward, setup_context=_save_inputs)


def _runs_between(cu_queries: Tensor, cu_keys: Tensor) -> list[tuple[int, int, int]]:
    return runs_of(cu_queries.diff().tolist(), cu_keys.diff().tolist())  # host sync on CUDA
