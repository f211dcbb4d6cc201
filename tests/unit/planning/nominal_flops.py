"""Counts the FLOPs of the published computation with torch: every block on all tokens, all patches embedded.

The real forward may compute less in last blocks and in the patch embedding; the FLOP model ignores that. Everything
runs on the meta device with the math attention backend, whose backward torch counts exactly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ijepa_scale.config import ModelConfig
from ijepa_scale.masks import DenseMasks, Masks
from ijepa_scale.models import build_jepa
from ijepa_scale.models.jepa import JEPA


class _EmbedsAll(nn.Module):
    """A patch embedding that embeds all patches before it selects some."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        tokens = self.inner(images)
        return tokens if index is None else tokens.flatten(0, 1).index_select(0, index)


@functools.lru_cache(maxsize=1)
def _built(model: ModelConfig) -> JEPA:
    jepa = build_jepa(model, seed=0, device="meta")
    jepa.encoder.patch_embed = _EmbedsAll(jepa.encoder.patch_embed)
    return jepa


@functools.lru_cache(maxsize=8)
def target_flops(model: ModelConfig, num_images: int) -> int:
    """Returns the FLOPs of the target's forward."""
    images = torch.empty(num_images, 3, *model.image_size, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        _built(model).encoder(images)
    return counter.get_total_flops()


def step_flops(model: ModelConfig, masks: Masks, *, num_images: int) -> dict[str, int]:
    """Returns the FLOPs of target, context and predictor, the latter two with backward, summed over all images."""
    jepa = _built(model)
    counts = {"target": target_flops(model, num_images)}
    masks = masks.map(lambda tensor: tensor.to("meta"))
    images = torch.empty(num_images, 3, *model.image_size, device="meta")
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            if isinstance(masks, DenseMasks):
                seen = jepa.encoder(images, masks.context)
            else:
                seen = jepa.encoder(images, index=masks.context_index, layout=masks.context_layout)
            seen.sum().backward()
        counts["context"] = counter.get_total_flops()
        seen = torch.empty_like(seen, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            _predict(jepa, seen, masks).sum().backward()
        counts["predictor"] = counter.get_total_flops()
    return counts


def _predict(jepa: JEPA, context: Tensor, masks: Masks) -> Tensor:
    """Returns the predictions, with each of the predictor's blocks run on all tokens."""
    predictor = jepa.predictor
    seen = predictor.predictor_embed(context)
    if isinstance(masks, DenseMasks):
        num_targets, num_images, asked = masks.targets.shape
        blank = torch.zeros(num_targets * len(seen), asked, predictor.width, device=seen.device)
        tokens, layout = torch.cat([seen.repeat(num_targets, 1, 1), blank], dim=1), None
    else:
        blank = torch.zeros(len(masks.target_index), predictor.width, device=seen.device)
        tokens, layout = torch.cat([seen, blank]).index_select(0, masks.predictor_source), masks.predictor_layout
    for block in predictor.predictor_blocks:
        tokens = block(tokens, layout)
    chosen = tokens[:, -asked:] if isinstance(masks, DenseMasks) else tokens.index_select(0, masks.target_rows)
    return predictor.predictor_proj(predictor.predictor_norm(chosen))
