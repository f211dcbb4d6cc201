"""PyTorch's variable-length flash attention, wrapped once: its signature moves between releases. Floor 1.

Written for torch 2.11: `varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale)`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ijepa_kernels.attention.layout import SequenceLayout

_HEAD_DIM_MULTIPLE = 8  # what the flash kernel takes; it rounds further up by itself (80 and 88 to 96)


def flash_packed(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, query_layout: SequenceLayout | None = None
) -> Tensor:
    """Returns block-diagonal attention of packed (total, heads, head_dim) tensors in bf16 or fp16.

    Reads `cu_seqlens` and `bound` of the layouts only, never the lengths: nothing synchronises, and a
    compiled block isn't compiled anew for other lengths. Head dims are padded with zeros to a multiple of 8.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5  # of the true head_dim, whatever the padding
    padding = -head_dim % _HEAD_DIM_MULTIPLE
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    queries = layout if query_layout is None else query_layout
    out = varlen_attn(
        q, k, v, queries.cu_seqlens, layout.cu_seqlens, queries.bound, layout.bound, scale=scale
    )  # fmt: skip
    assert isinstance(out, Tensor)  # a tuple only where return_aux asks for one
    return out[..., :head_dim] if padding else out
