"""Dense attention in a named kernel of PyTorch's SDPA."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# fa3 and fa4 replace PyTorch's flash kernel in the whole process, see `backend.activate`
SDPA_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, kernel: str | None = None) -> Tensor:
    """Returns the attention of q (B, heads, Q, head_dim) to k and v (B, heads, N, head_dim), in the shape of q.

    `kernel` is a key of `SDPA_KERNELS`; None leaves the choice to PyTorch. torch.compile traces the choice, so a
    compiled graph holds the kernel itself.

    Raises:
        RuntimeError: the kernel can't run these tensors.
    """
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPA_KERNELS[kernel]):
        return F.scaled_dot_product_attention(q, k, v)
