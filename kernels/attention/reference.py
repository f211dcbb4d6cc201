"""The specification of `attention`: an explicit softmax in at least fp32, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_kernels.attention.layout import SequenceLayout


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout | None = None, query_layout: SequenceLayout | None = None
) -> Tensor:
    """Returns softmax(q k^T / sqrt(head_dim)) v within each sequence, in the dtype of `q`.

    Without a layout, q, k and v are (B, heads, N, head_dim). With a layout they are (total, heads, head_dim), and no
    sequence attends to another; `query_layout`, where given, holds the lengths of the sequences of `q`.

    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.2.1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if layout is None:
        return _softmax_attention(q.to(wide), k.to(wide), v.to(wide)).to(q.dtype)
    pieces = []
    queries, keys = ((query_layout or layout).lengths, layout.lengths)
    for one_q, one_k, one_v in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        one = [x.to(wide).transpose(0, 1) for x in (one_q, one_k, one_v)]
        pieces.append(_softmax_attention(*one).transpose(0, 1).to(q.dtype))
    return torch.cat(pieces) if pieces else torch.zeros_like(q)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    weights = scores.exp()
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v
