"""The predictor: a narrow transformer from context tokens to target features. Knows no process.

Shapes: B images, N patches, D encoder channels, E context blocks of K tokens, M target blocks of T
tokens; packed: C context tokens, R target tokens, P tokens of all predictor sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ijepa_scale.masks.types import PackedMasks
from ijepa_scale.models.layers import Block, LayerNorm, Linear
from ijepa_scale.models.pos_embed import resample, sincos_2d


class Predictor(nn.Module):
    """Predicts the target encoder's features at target places, one sequence per target block.

    `predictor_pos_embed` (1, N, width) is a buffer, as in the encoder. Build it with `build_predictor`.

    Source: arXiv 2301.08243, section 3 ("Prediction").
    """

    predictor_pos_embed: Tensor

    def __init__(
        self, *, grid: tuple[int, int], encoder_width: int, width: int, depth: int, heads: int, mlp_width: int
    ) -> None:
        super().__init__()
        self.grid = grid
        self.width = width
        self.predictor_embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_2d(width, grid)[None])
        self.predictor_blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(depth))
        self.predictor_norm = LayerNorm(width)
        self.predictor_proj = Linear(width, encoder_width)

    def forward(
        self,
        context: Tensor,
        keep: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        masks: PackedMasks | None = None,
    ) -> Tensor:
        """Returns the predicted features of the target tokens.

        Dense: `context` (B, K, D) with `keep` (B, K), or E context blocks (E * B, K, D) with (E, B, K), and
        `targets` (M, B, T), int64 places, give (M * E * B, T, D), rows in the order (target block, context
        block, image), images fastest. Packed: `context` (C, D) with `masks` gives (R, D) in the order of
        `masks.target_index`.

        Raises:
            ValueError: neither `keep` and `targets` nor `masks` given, or tokens that don't fit `keep`.
        """
        if masks is not None and keep is None and targets is None:
            return self._packed(context, masks)
        if keep is None or targets is None or masks is not None:
            raise ValueError("the predictor needs either keep and targets, or packed masks; give one of the two")
        keep = keep if keep.dim() == 3 else keep[None]
        num_context, num_images, num_kept = keep.shape
        if context.shape[:2] != (num_context * num_images, num_kept) or targets.shape[1] != num_images:
            raise ValueError(
                f"context {tuple(context.shape)} doesn't fit keep {tuple(keep.shape)} and targets "
                f"{tuple(targets.shape)}; give (E * B, K, D), (E, B, K) and (M, B, T)"
            )
        return self._dense(context, keep, targets)

    def _dense(self, context: Tensor, keep: Tensor, targets: Tensor) -> Tensor:
        num_context, num_kept = keep.shape[0], keep.shape[2]
        num_targets = targets.shape[0]
        seen = self.predictor_embed(context) + self._positions(keep.flatten(0, 1))
        asked = self.mask_token + self._positions(targets)
        asked = asked[:, None].expand(-1, num_context, -1, -1, -1).flatten(0, 2)
        # Not a view of something: torch.compile would make a graph of its own for the first block.
        tokens = torch.cat([seen.repeat(num_targets, 1, 1), asked], dim=1)
        *blocks, last = self.predictor_blocks
        for block in blocks:
            tokens = block(tokens)
        asked = last(tokens, queries=tokens[:, num_kept:])
        return self.predictor_proj(self.predictor_norm(asked))

    def _packed(self, context: Tensor, masks: PackedMasks) -> Tensor:
        num_patches = self.predictor_pos_embed.shape[1]
        seen = self.predictor_embed(context) + self._positions(masks.context_index % num_patches)
        asked = self.mask_token[0] + self._positions(masks.target_index % num_patches)
        tokens = torch.cat([seen, asked]).index_select(0, masks.predictor_source)
        *blocks, last = self.predictor_blocks
        for block in blocks:
            tokens = block(tokens, masks.predictor_layout)
        asked = tokens.index_select(0, masks.target_rows)
        asked = last(tokens, masks.predictor_layout, queries=asked, query_layout=masks.target_layout)
        return self.predictor_proj(self.predictor_norm(asked))

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Makes the predictor take another grid of patches, by resampling its position embedding in place."""
        self.predictor_pos_embed = resample(self.predictor_pos_embed, self.grid, grid)
        self.grid = grid

    def _positions(self, places: Tensor) -> Tensor:
        """Returns the position embeddings (..., width) at `places`."""
        return self.predictor_pos_embed[0].index_select(0, places.flatten()).unflatten(0, places.shape)
