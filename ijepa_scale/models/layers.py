"""The layers of both transformers. Floor 2: plain nn.Modules; knows no mask, no process and no precision policy.

The residual stream stays in fp32 whatever the weights or autocast are: a bf16 residual stream triples
the rounding error of a deep network. So layers take fp32 and cast inside: `Linear` and the patch
convolution to their weight's dtype (autocast does it where weights are fp32), `LayerNorm` to fp32.
Shapes: B images, N tokens, D channels, T tokens of a packed batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_kernels.attention import SequenceLayout, attention

LAYER_NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer that takes input of any floating dtype and answers in its weight's, or autocast's."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the projection along the last dimension."""
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            input = input.to(self.weight.dtype)
        return super().forward(input)


class LayerNorm(nn.LayerNorm):
    """A layer norm computed and answered in fp32 at least, whatever the weights' dtype."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input` normalised along the last dimension."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


class PatchEmbed(nn.Module):
    """The convolution whose kernel is its stride: one token per patch."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Returns tokens (B, N, D), row-major, of images (B, 3, H, W)."""
        if self.proj.weight.dtype in (torch.bfloat16, torch.float16):
            images = images.to(self.proj.weight.dtype)
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection whose output is laid out (3, heads, head_dim)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width {width} doesn't divide into {heads} heads; "
                f"try width {max(1, round(width / heads)) * heads} or other heads"
            )
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """Returns the attended tokens, shaped as `x`: (B, N, D), or packed (T, D) with their layout."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if layout is not None:
            q, k, v = qkv.unbind(1)
            return self.proj(attention(q, k, v, layout).flatten(1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, mlp_width)
        self.fc2 = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the transformed tokens, shaped as `x`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then MLP, each added to the residual stream.

    Source: the I-JEPA paper (arXiv 2301.08243) with the ViT of arXiv 2010.11929, figure 1.
    """

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x: Tensor, layout: SequenceLayout | None = None, drop: Tensor | None = None) -> Tensor:
        """Returns the tokens after the block: (B, N, D), or packed (T, D) with their layout; fp32 stays fp32.

        `drop` (B, 2) fp32, for (B, N, D) only, is drop path: each image's factors of the two branches,
        attention and MLP. A factor of 0 leaves an image as it is.
        """
        branch = self.attn(self.norm1(x), layout)
        x = x + (branch if drop is None else branch * drop[:, :1, None])
        branch = self.mlp(self.norm2(x))
        return x + (branch if drop is None else branch * drop[:, 1:, None])
