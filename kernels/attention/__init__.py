"""Self-attention over dense batches and over packed sequences of different lengths.

Packed sequences run in the kernel that device and dtype determine, dense batches in the one that the caller names.
Neither tries another one after a failure. `reference.py` is the specification they are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ijepa_kernels.attention.dense import dense_attention
from ijepa_kernels.attention.layout import SequenceLayout, check_paired, runs_of
from ijepa_kernels.attention.runs import attention_by_runs, opaque_attention_by_runs
from ijepa_kernels.attention.varlen import flash_packed

__all__ = ["SequenceLayout", "attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout | None = None,
    query_layout: SequenceLayout | None = None,
    *,
    kernel: str | None = None,
) -> Tensor:
    """Returns softmax(q k^T / sqrt(head_dim)) v within each sequence, in the shape and dtype of `q`.

    Without a layout the batch is dense: q is (B, heads, Q, head_dim), k and v are (B, heads, N, head_dim), and
    PyTorch's SDPA computes the result, in `kernel` (a key of `dense.SDPA_KERNELS`) or, for None, in one of its choice.

    With a layout the sequences are packed: all three are (total, heads, head_dim), and the sequences of `layout`
    follow one another. `query_layout`, where given, holds the lengths for q. On CUDA in bf16 or fp16 this is
    variable-length flash attention, elsewhere one dense call, in `kernel`, for each run of equally long sequences.

    Raises:
        RuntimeError: the kernel can't run these tensors.
        ValueError: a layout doesn't cover the tokens, or the two layouts hold different numbers of sequences.
            Compiled code doesn't check this.
    """
    if layout is None:
        return dense_attention(q, k, v, kernel)
    queries = layout if query_layout is None else query_layout
    compiling = torch.compiler.is_compiling()
    if not compiling:  # compiled code would be specialised to the lengths
        check_paired(queries, layout)
        _check_covered(q, queries)
        _check_covered(k, layout)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return flash_packed(q, k, v, layout, queries)
    if compiling:
        return opaque_attention_by_runs(q, k, v, queries.cu_seqlens, layout.cu_seqlens, kernel)
    return attention_by_runs(q, k, v, runs_of(queries.lengths, layout.lengths), kernel)


def _check_covered(tokens: Tensor, layout: SequenceLayout) -> None:
    """Checks that the layout covers the tokens, from the lengths on the host."""
    if layout.total != tokens.shape[0]:
        raise ValueError(
            f"{tokens.shape[0]} packed tokens but the layout's {len(layout.lengths)} sequences hold {layout.total}; "
            "pass the layout that belongs to these tokens"
        )
