"""Counts a model's parameters in closed form. Builds no model."""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.schema import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters in each part. Position embeddings are part of the state but not trained."""

    encoder: int  # trained
    encoder_positions: int  # position embedding
    predictor: int  # trained, including the mask token
    predictor_positions: int  # position embedding

    @property
    def trainable(self) -> int:
        """The number of parameters that the optimiser updates."""
        return self.encoder + self.predictor

    @property
    def target(self) -> int:
        """The number of parameters that the target update changes, equal to the encoder's trained ones."""
        return self.encoder

    @property
    def encoder_total(self) -> int:
        """The encoder's parameters with its position embedding, as published figures count them."""
        return self.encoder + self.encoder_positions

    @property
    def predictor_total(self) -> int:
        """The predictor's parameters with its position embedding."""
        return self.predictor + self.predictor_positions


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Returns the parameter counts of the model that `model` describes.

    Raises:
        ConfigError: unknown name, or sizes that don't divide.
    """
    sizes = resolve(model)
    width, narrow = sizes.width, sizes.predictor_width
    patch = sizes.channels * sizes.patch_size**2 * width + width
    encoder = patch + sizes.depth * block_parameters(width, sizes.mlp_width) + 2 * width
    embed, mask_token, project = width * narrow + narrow, narrow, narrow * width + width
    blocks = sizes.predictor_depth * block_parameters(narrow, sizes.predictor_mlp_width)
    return ParameterCounts(
        encoder=encoder,
        encoder_positions=sizes.num_patches * width,
        predictor=embed + mask_token + blocks + 2 * narrow + project,
        predictor_positions=sizes.num_patches * narrow,
    )


def block_parameters(width: int, mlp_width: int) -> int:
    """Returns the parameters of one pre-norm block: two norms, qkv, projection and MLP, all with bias."""
    norms = 4 * width
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * mlp_width + mlp_width + width
    return norms + attention + mlp
