"""The layers of both transformers. Plain nn.Modules, independent of masks, processes and precision policies.

The residual stream stays in fp32 whatever the dtype of the weights or autocast: a bf16 residual stream triples the
rounding error of a deep network. So layers take fp32 and cast inside: `Linear` and the patch convolution to their
weight's dtype (autocast does this for fp32 weights), `LayerNorm` to fp32.

Shapes: B images, N tokens, D channels, T tokens of a packed batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_kernels.attention import SequenceLayout, attention
from ijepa_kernels.linear import linear

LAYER_NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer that takes input of any floating dtype and returns its weight's dtype, or autocast's."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns the projection along the last dimension."""
        return linear(self._cast(input), self.weight, self.bias)

    def rows(self, input: Tensor, start: int, stop: int) -> Tensor:
        """Returns only the outputs [start, stop) of `forward`."""
        return linear(self._cast(input), self.weight[start:stop], self.bias[start:stop])

    def _cast(self, input: Tensor) -> Tensor:
        low = self.weight.dtype in (torch.bfloat16, torch.float16)
        return input.to(self.weight.dtype) if low else input


class LayerNorm(nn.LayerNorm):
    """A layer norm that computes and returns at least fp32, whatever the weights' dtype."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input` normalised along the last dimension."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)


class PatchProjection(nn.Conv2d):
    """A convolution whose kernel equals its stride, applied to extracted patches as one matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns tokens (..., D) of patches (..., C * P * P), each in the order (channel, row, column)."""
        weight = self.weight.flatten(1)
        if input.is_cuda:
            input, weight = aligned(input, weight)
        if weight.dtype in (torch.bfloat16, torch.float16):
            input = input.to(weight.dtype)
        return linear(input, weight, self.bias)


def aligned(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `input` (..., K) and `weight` (D, K), both ending in zeros if a row isn't a multiple of 16 bytes.

    The fastest products on GPUs need that alignment, and the 588 numbers of a 14 x 14 patch lack it in bf16. Zeros add
    nothing to a sum. They are written while `input` is cast to the product's dtype. The weight is copied in each
    forward: 3 MB of traffic for ViT-H/14, and as much for its gradient, which has the original shape.

    Source: NVIDIA's "Matrix Multiplication Background User's Guide", section "Tensor Core Requirements".
    """
    dtype, device, width = weight.dtype, input.device.type, weight.shape[1]
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    zeros = -width % (16 // dtype.itemsize)
    if not zeros:
        return input, weight
    padded = input.new_empty((*input.shape[:-1], width + zeros), dtype=dtype)
    padded[..., :width] = input
    padded[..., width:] = 0
    return padded, F.pad(weight.to(dtype), (0, zeros))


class PatchEmbed(nn.Module):
    """Embeds all patches, or some of them, as one token each."""

    def __init__(self, patch_size: int, width: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Returns the tokens (B, N, D), row-major, of images (B, C, H, W).

        With `index` (C,) into the flattened B * N patches, returns only these, (C, D).
        """
        size = self.patch_size
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, rows, P, columns, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.proj(patches if index is None else patches.flatten(0, 1).index_select(0, index))


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection, whose output has the layout (3, heads, head_dim)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width {width} doesn't divide into {heads} heads; "
                f"try width {max(1, round(width / heads)) * heads} or other heads"
            )
        self.heads = heads
        self.kernel: str | None = None  # of dense attention, see `attention`; the engine sets it
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout | None = None,
        queries: Tensor | None = None,
        query_layout: SequenceLayout | None = None,
    ) -> Tensor:
        """Returns the attended tokens in the shape of the queries: (B, N, D), or packed (T, D) with their layout.

        The queries are `x`, unless `queries` is given: (B, Q, D), or packed (R, D) with their `query_layout`.
        """
        if queries is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        else:
            width = x.shape[-1]
            q = self.qkv.rows(queries, 0, width).unflatten(-1, (self.heads, -1))
            k, v = self.qkv.rows(x, width, 3 * width).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        if layout is not None:
            return self.proj(attention(q, k, v, layout, query_layout, kernel=self.kernel).flatten(1))
        # transpose after unbind: then the gradients of q, k and v are joined in one copy instead of two
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return self.proj(attention(q, k, v, kernel=self.kernel).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, mlp_width)
        self.fc2 = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the transformed tokens, in the shape of `x`."""
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

    def forward(
        self,
        x: Tensor,
        layout: SequenceLayout | None = None,
        drop: Tensor | None = None,
        queries: Tensor | None = None,
        query_layout: SequenceLayout | None = None,
    ) -> Tensor:
        """Returns the tokens after the block: (B, N, D), or packed (T, D) with their layout; fp32 stays fp32.

        `drop` (B, 2) fp32, for (B, N, D) only, holds drop path's factors of the two branches, attention and MLP, for
        each image. A factor of 0 skips the branch for that image.

        `queries` are some of the tokens of `x`: (B, Q, D), or packed (R, D) with their `query_layout`. If given, the
        block returns only these tokens. In the last block of a network, the other tokens then only cost keys and
        values.
        """
        normed = self.norm1(x)
        if queries is None:
            branch = self.attn(normed, layout)
        else:
            branch = self.attn(normed, layout, self.norm1(queries), query_layout)
            x = queries
        x = x + (branch if drop is None else branch * drop[:, :1, None])
        branch = self.mlp(self.norm2(x))
        return x + (branch if drop is None else branch * drop[:, 1:, None])
