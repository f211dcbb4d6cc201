"""The predictor: a narrow transformer from context tokens to target features. Must not depend on processes.

Shapes: B images, N patches, D encoder channels, E context blocks of K tokens, M target blocks of T
tokens; packed: C context tokens, R target tokens, P tokens of all predictor sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ijepa_scale.masks.types import PackedMasks
from ijepa_scale.models.layers import Block, LayerNorm, Linear
from ijepa_scale.models.pos_embed import positions


class Predictor(nn.Module):
    """Predicts the target encoder's features of the target patches, with one sequence per target block.

    `predictor_pos_embed` (1, N, width) is a buffer, as in the encoder. Use `build_predictor` to build one.

    Source: arXiv 2301.08243, section 3 ("Prediction").
    """

    predictor_pos_embed: Tensor

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        position_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.position_grid = position_grid
        self.width = width
        self.predictor_embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", positions(width, grid, position_grid)[None])
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

        Dense: takes `context` (B, K, D) with `keep` (B, K), or E context blocks (E * B, K, D) with `keep` (E, B, K),
        and `targets` (M, B, T). `keep` and `targets` are int64 patch indices. Returns (M * E * B, T, D), ordered by
        (target block, context block, image); the image varies fastest.

        Packed: takes `context` (C, D) with `masks`. Returns (R, D) in the order of `masks.target_index`.

        Raises:
            ValueError: neither `keep` and `targets` nor `masks` are given, or the tokens don't fit `keep`.
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
        context = self.predictor_embed(context) + self._positions(keep.flatten(0, 1))
        queries = self.mask_token + self._positions(targets)
        queries = queries[:, None].expand(-1, num_context, -1, -1, -1).flatten(0, 2)
        # The input of the first block must not be a view: torch.compile would make a separate graph for it.
        tokens = torch.cat([context.repeat(num_targets, 1, 1), queries], dim=1)
        *blocks, last = self.predictor_blocks
        for block in blocks:
            tokens = block(tokens)
        # Nor may the queries be a view: if torch.compile guards a size of the tensor behind it, it sometimes fails, by
        # Python's hash seed, with "sources must not be empty for symbol" (torch 2.11).
        predicted = last(tokens, queries=tokens[:, num_kept:].clone())
        return self.predictor_proj(self.predictor_norm(predicted))

    def _packed(self, context: Tensor, masks: PackedMasks) -> Tensor:
        num_patches = self.predictor_pos_embed.shape[1]
        context = self.predictor_embed(context) + self._positions(masks.context_index % num_patches)
        queries = self.mask_token[0] + self._positions(masks.target_index % num_patches)
        tokens = torch.cat([context, queries]).index_select(0, masks.predictor_source)
        *blocks, last = self.predictor_blocks
        for block in blocks:
            tokens = block(tokens, masks.predictor_layout)
        queries = tokens.index_select(0, masks.target_rows)
        predicted = last(tokens, masks.predictor_layout, queries=queries, query_layout=masks.target_layout)
        return self.predictor_proj(self.predictor_norm(predicted))

    @torch.no_grad()
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Switches the predictor to another grid of patches, by interpolating its position embedding in place."""
        trained = self.position_grid or self.grid
        self.predictor_pos_embed = positions(self.width, grid, trained)[None].to(self.predictor_pos_embed)
        self.grid, self.position_grid = grid, None if trained == grid else trained

    def _positions(self, patches: Tensor) -> Tensor:
        """Returns the position embeddings (..., width) of the patch indices `patches` (...)."""
        return self.predictor_pos_embed[0].index_select(0, patches.flatten()).unflatten(0, patches.shape)
