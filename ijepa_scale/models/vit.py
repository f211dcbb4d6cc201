"""The encoder: a vision transformer without class token. Must not depend on mask samplers, losses or processes.

All ways to run it go through `forward`, because engines hook `__call__`; the named methods are aliases for readers.

Shapes: B images, N patches, D channels, E context blocks, K kept tokens per block, C kept tokens of a packed batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ijepa_kernels.attention import SequenceLayout
from ijepa_scale.models.layers import Block, LayerNorm, PatchEmbed
from ijepa_scale.models.pos_embed import positions


class VisionTransformer(nn.Module):
    """The context or target encoder of I-JEPA.

    `pos_embed` (1, N, D) is a buffer: in the state dict, never trained, and fp32 even if weights are sharded in
    another dtype. Returned tokens are fp32. Use `build_encoder` to build and initialise one.

    Source: arXiv 2301.08243, section 3; ViT: arXiv 2010.11929.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        position_grid: tuple[int, int] | None = None,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.position_grid = position_grid
        self.patch_size = patch_size
        self.width = width
        self.channels = channels
        self.patch_embed = PatchEmbed(patch_size, width, channels)
        self.register_buffer("pos_embed", positions(width, grid, position_grid)[None])
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(depth))
        self.norm: nn.Module = LayerNorm(width)

    def forward(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        *,
        index: Tensor | None = None,
        layout: SequenceLayout | None = None,
        wanted: Tensor | None = None,
        last: int | None = None,
        drop: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns the tokens of images (B, channels, H, W) after the final norm, fp32: by default all, (B, N, D).

        Args:
            images: (B, channels, H, W).
            keep: patch indices (B, K) int64: encodes only these, returns (B, K, D). Or (E, B, K), E context blocks
                per image: returns (E * B, K, D), where the image varies fastest.
            index: (C,) int64 into the flattened B * N patches, with their `layout`: encodes packed sequences,
                returns (C, D).
            layout: the lengths of the packed sequences.
            wanted: patch indices (B, U) int64: encodes all patches but returns only these, (B, U, D). In the last
                block the other tokens only cost keys and values.
            last: n: returns a tuple of the all-token outputs of the last n blocks, each after the final norm, the
                deepest last.
            drop: (B, depth, 2), only with `last`: drop path's factors, see `Block`.

        Raises:
            ValueError: the images don't fit the grid or the channels, arguments can't be combined, or `last` is outside
                1 ... depth.
        """
        ways = sum(way is not None for way in (keep, index, wanted, last))
        self._check(images, ways, index, layout)
        if drop is not None and (last is None or tuple(drop.shape) != (len(images), len(self.blocks), 2)):
            raise ValueError(
                f"drop is {tuple(drop.shape)} with last {last}; give (B, depth, 2), here "
                f"({len(images)}, {len(self.blocks)}, 2), together with last: drop path needs all tokens of an image"
            )
        tokens = self._embed(images, keep, index)
        if last is not None:
            return self._last(tokens, last, drop)
        return self.head(self._before_last(tokens, layout), layout, wanted=wanted)

    def trunk(self, images: Tensor) -> Tensor:
        """Returns the input (B, N, D), fp32, of the last block; its shape depends on `images` alone.

        `head(trunk(images), wanted=wanted)` equals `forward(images, wanted=wanted)`, but bypasses the hooks that
        engines put on `__call__`. Use it only if the device holds the whole, unsharded weights.
        """
        self._check(images, 0, None, None)
        return self._before_last(self._embed(images, None, None), None)

    def head(self, tokens: Tensor, layout: SequenceLayout | None = None, *, wanted: Tensor | None = None) -> Tensor:
        """Returns `tokens`, or those at `wanted` (B, U), after the last block and the final norm."""
        final = self.blocks[-1]
        if wanted is None:
            return self.norm(final(tokens, layout))
        images = torch.arange(len(tokens), device=wanted.device)[:, None]
        return self.norm(final(tokens, queries=tokens[images, wanted]))  # no view: see `Predictor._dense`

    def _before_last(self, tokens: Tensor, layout: SequenceLayout | None) -> Tensor:
        *blocks, _ = self.blocks
        for block in blocks:
            tokens = block(tokens, layout)
        return tokens

    def encode_blocks(self, images: Tensor, keep: Tensor) -> Tensor:
        """Returns the tokens (E * B, K, D) of the E context blocks `keep` (E, B, K)."""
        return self(images, keep)

    def encode_packed(self, images: Tensor, index: Tensor, layout: SequenceLayout) -> Tensor:
        """Returns the tokens (C, D) of the packed sequences of `layout`, taken at `index` (C,) of B * N patches."""
        return self(images, index=index, layout=layout)

    def features(self, images: Tensor, last: int = 1) -> tuple[Tensor, ...]:
        """Returns the tokens (B, N, D) of the last `last` blocks, each after the final norm, deepest last."""
        return self(images, last=last)

    @torch.no_grad()
    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Switches the encoder to images of another size (pixels), by interpolating its position embedding in place.

        The embedding that it was trained with, of `position_grid`, is interpolated, however often the size changes.

        Raises:
            ValueError: the size is not a multiple of the patch size.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        patch = self.patch_size
        if height < patch or width < patch or height % patch or width % patch:
            near = tuple(max(1, round(side / patch)) * patch for side in (height, width))
            raise ValueError(f"image size {(height, width)} is not a multiple of patch size {patch}; try {near}")
        grid = height // patch, width // patch
        trained = self.position_grid or self.grid
        self.pos_embed = positions(self.width, grid, trained)[None].to(self.pos_embed)
        self.grid, self.position_grid = grid, None if trained == grid else trained

    def _embed(self, images: Tensor, keep: Tensor | None, index: Tensor | None) -> Tensor:
        """Returns patches plus positions, fp32: all (B, N, D), those at `keep` (E * B, K, D), or at `index` (C, D).

        The sum comes last, because the result must not be a view: torch.compile would make a separate graph for the
        first block.
        """
        if keep is None and index is None:
            return self.patch_embed(images) + self.pos_embed
        num_patches = self.pos_embed.shape[1]
        if keep is not None:
            index = keep + torch.arange(len(images), device=keep.device)[:, None] * num_patches
        assert index is not None
        shape = (-1, self.width) if keep is None else (-1, keep.shape[-1], self.width)
        chosen = self.patch_embed(images, index.flatten())
        positions = self.pos_embed[0].index_select(0, index.flatten() % num_patches)
        return chosen.view(shape) + positions.view(shape)

    def _last(self, tokens: Tensor, last: int, drop: Tensor | None) -> tuple[Tensor, ...]:
        if not 1 <= last <= len(self.blocks):
            raise ValueError(f"last is {last}; give 1 to {len(self.blocks)}, the encoder's blocks")
        outputs = []
        # clone: for views of one tensor at different offsets, torch.compile would make different graphs
        factors = [None] * len(self.blocks) if drop is None else [factor.clone() for factor in drop.unbind(1)]
        for number, (block, factor) in enumerate(zip(self.blocks, factors, strict=True), start=1):
            tokens = block(tokens) if factor is None else block(tokens, None, factor)
            if number > len(self.blocks) - last:
                outputs.append(self.norm(tokens))
        return tuple(outputs)

    def _check(self, images: Tensor, ways: int, index: Tensor | None, layout: SequenceLayout | None) -> None:
        if ways > 1 or (index is None) != (layout is None):
            raise ValueError(
                "the encoder was given more than one of keep, index, wanted and last, or only one of index and layout; "
                "give keep, or index with its layout, or wanted, or last, or none of them"
            )
        expected = (self.channels, *(side * self.patch_size for side in self.grid))
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images are {tuple(images.shape)}; this encoder takes (B, {', '.join(map(str, expected))}): "
                "build it with that image_size and those channels, or call set_image_size to resample the position "
                "embedding"
            )
