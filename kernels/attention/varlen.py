"""PyTorch's variable-length flash attention, wrapped in one function because its signature changes between releases.

2.10: varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, return_aux), without a scale.
2.11: (the same first seven, *, return_aux, scale, window_size). 2.12 adds keywords for grouped queries and paged keys,
and 2.15 takes cuDNN's kernel first where that can run. Source: `torch/nn/attention/varlen.py` of the releases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ijepa_kernels.attention.layout import SequenceLayout

_HEAD_DIM_MULTIPLE = 8  # required by the flash kernel, which rounds up further internally (80 and 88 to 96)


class VarlenCall:
    """Calls the `varlen_attn` of any of these releases."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._takes_scale = "scale" in inspect.signature(function).parameters

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, query_layout: SequenceLayout, *, scale: float
    ) -> Tensor:
        """Returns the attention of packed (total, heads, head_dim) tensors, with scores multiplied by `scale`."""
        bounds = (query_layout.cu_seqlens, layout.cu_seqlens, query_layout.bound, layout.bound)
        if self._takes_scale:
            out = self._function(q, k, v, *bounds, scale=scale)
        else:  # this release divides scores by the root of the padded head dim: scale q to make up for the difference
            factor = scale * q.shape[-1] ** 0.5
            out = self._function(q if factor == 1.0 else q * factor, k, v, *bounds)
        assert isinstance(out, Tensor)  # a tuple only with return_aux
        return out


_varlen = VarlenCall(varlen_attn)


def flash_packed(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, query_layout: SequenceLayout | None = None
) -> Tensor:
    """Returns block-diagonal attention of packed (total, heads, head_dim) tensors in bf16 or fp16.

    Reads `cu_seqlens` and `bound` of the layouts, but never the lengths. So it doesn't synchronise, and other lengths
    don't recompile a compiled block. Pads head dims with zeros to a multiple of 8.
    """
    head_dim = q.shape[-1]
    scale = head_dim**-0.5  # of the true head_dim, whatever the padding
    padding = -head_dim % _HEAD_DIM_MULTIPLE
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out = _varlen(q, k, v, layout, layout if query_layout is None else query_layout, scale=scale)
    return out[..., :head_dim] if padding else out
