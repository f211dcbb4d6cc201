"""The affine layer norm as PyTorch's own operation in fp32: the specification, which torch.compile can fuse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the normalised values in `dtype`; see `ijepa_kernels.layer_norm.layer_norm`."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype)
