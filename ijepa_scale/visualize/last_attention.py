"""The attention weights of an encoder's last block, which its fused kernels never write down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ijepa_scale.models.vit import VisionTransformer


@torch.no_grad()
def last_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Returns the weights (B, heads, N, N), float32, of the last block: of query (third axis) on key patches (fourth).

    Each row over the keys sums to 1. `images` is (B, C, h, w), on the encoder's device. Takes memory of N * N per head.

    Source: "Attention is all you need", arXiv 1706.03762, equation 1.
    """
    block: Any = encoder.blocks[-1]
    tokens = block.norm1(encoder.trunk(images))
    q, k, _ = block.attn.qkv(tokens).float().unflatten(-1, (3, block.attn.heads, -1)).unbind(-3)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1)
