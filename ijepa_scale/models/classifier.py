"""The classifier for finetuning: the encoder with a linear layer on its pooled tokens.

Must not depend on processes or optimisers. Drop path takes its factors as an argument instead of drawing them:
`drop_factors` computes them on the host from (seed, step, sample), so which image drops which branch depends neither
on accumulation, nor on processes, nor on recomputation in backward.

Shapes: B images, N patches, D channels, L layers whose tokens are pooled, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ijepa_scale import rng
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.errors import ConfigError
from ijepa_scale.models.init import initialise, initialise_head
from ijepa_scale.models.layers import LayerNorm, Linear
from ijepa_scale.models.registry import build_encoder
from ijepa_scale.models.vit import VisionTransformer
from ijepa_scale.plurals import counted


class Classifier(nn.Module):
    """An encoder, the mean of its tokens, and a linear layer. Build it with `build_classifier`.

    With `pool_norm` "after", the encoder loses its final norm, and a new one, `fc_norm`, follows the mean; "before"
    keeps the trained norm. If several layers are pooled, each layer's mean goes through the same norm.

    Source: arXiv 2111.06377, appendix A.1, with its released code ("after"); arXiv 2301.08243, appendix
    A.1 (means of the last layer or of the last 4).
    """

    def __init__(self, encoder: VisionTransformer, config: ClassifierConfig) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.drop_rates = drop_rates(config.drop_path, len(encoder.blocks))
        self.encoder = encoder
        self.fc_norm: nn.Module = nn.Identity()
        if config.pool_norm == "after":
            self.encoder.norm = nn.Identity()
            self.fc_norm = LayerNorm(encoder.width)
        self.head = Linear(config.num_layers * encoder.width, config.num_classes)
        if config.frozen_blocks:
            for part in (encoder.patch_embed, *encoder.blocks[: config.frozen_blocks]):
                part.requires_grad_(False)

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Returns the logits (B, C), fp32, of images (B, 3, H, W).

        `drop` (B, depth, 2) fp32 holds the factors from `drop_factors`, on the images' device. It is required in
        training with drop path, and refused in evaluation.

        Raises:
            ValueError: `drop` is given in evaluation, or missing in training with drop path.
        """
        if self.training and drop is None and any(self.drop_rates):
            raise ValueError(
                f"the classifier trains with drop path {self.drop_rates[-1]} but was given no factors; "
                "pass drop_factors(...), or set model.drop_path=0"
            )
        if drop is not None and not self.training:
            raise ValueError(
                "the classifier is in evaluation mode, which drops nothing; pass no factors, or call train()"
            )
        layers = self.encoder(images, last=self.num_layers, drop=drop)
        pooled = [self.fc_norm(tokens.mean(dim=1)) for tokens in layers]
        return self.head(torch.cat(pooled, dim=-1)).float()


def drop_rates(rate: float, depth: int) -> list[float]:
    """Returns the drop rate of each block, linear from 0 at the first to `rate` at the last.

    Source: arXiv 1603.09382, section 3 ("linear decay"), as arXiv 2111.06377 uses it.
    """
    return [rate * block / max(1, depth - 1) for block in range(depth)]


def drop_factors(rates: list[float], *, seed: int, step: int, samples: np.ndarray) -> Tensor:
    """Returns factors of the branches of these images, (B, depth, 2) fp32 on the CPU: 0 or 1 / (1 - rate).

    Each image has its own draw for each block's attention and MLP. `samples` (B,) are the images' positions in the
    global batch (`batch.position + arange`), or their ids. A row depends only on its own sample, the seed and the
    step. The mean of each factor is 1.
    """
    rate = np.asarray(rates, dtype=np.float64)[None, :, None]
    draws = rng.uniform(seed, "drop_path", step, samples, 2 * len(rates)).reshape(len(samples), len(rates), 2)
    return torch.from_numpy(((draws >= rate) / (1.0 - rate)).astype(np.float32))


def build_classifier(
    config: ClassifierConfig, *, seed: int = 0, device: torch.device | str | None = None
) -> Classifier:
    """Returns the classifier with weights drawn from `seed`; `checkpoint.weights` loads trained ones.

    The encoder's weights equal those of `build_encoder`. They are drawn on the CPU; on "meta" none are drawn.

    Raises:
        ConfigError: the name is unknown, sizes don't divide, or the config uses more blocks than there are.
    """
    encoder = build_encoder(**dict(config.encoder), seed=seed, device=device)
    depth = len(encoder.blocks)
    if config.frozen_blocks > depth:
        raise ConfigError(f"model.frozen_blocks is {config.frozen_blocks} of {depth} blocks; give at most {depth}")
    if config.num_layers > depth:
        raise ConfigError(
            f"model.representation is {config.representation} but there are "
            f"{counted(depth, 'block')}; choose last, or more blocks"
        )
    with torch.device("meta"):  # so that constructors don't draw from the global generator
        classifier = Classifier(encoder, config)
    if torch.device(device or "cpu").type == "meta":
        return classifier
    generator = rng.generator(seed, "init.classifier")
    for part in (classifier.fc_norm, classifier.head):
        initialise(part.to_empty(device="cpu"), generator)
    initialise_head(classifier.head, generator)
    return classifier.to(device)
