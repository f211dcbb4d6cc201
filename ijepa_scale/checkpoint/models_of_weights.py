"""Builds the models that weights belong to: encoder, classifier, predictor. Knows nothing of files."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import nn

from ijepa_scale.checkpoint.geometry import PATCHES, positions_of, sizes_of_weights
from ijepa_scale.checkpoint.heads import check_heads
from ijepa_scale.checkpoint.sources import Weights, WeightsSource
from ijepa_scale.checkpoint.start import fill_predictor, predictor_sizes
from ijepa_scale.checkpoint.weights import fit
from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.config.form import Positions
from ijepa_scale.config.schema import EncoderConfig, ModelConfig
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.models.classifier import Classifier, build_classifier
from ijepa_scale.models.layers import LayerNorm
from ijepa_scale.models.predictor import Predictor
from ijepa_scale.models.registry import build_encoder, build_predictor
from ijepa_scale.models.vit import VisionTransformer

logger = logging.getLogger(__name__)


def encoder_of_weights(
    weights: Weights,
    *,
    image_size: int | tuple[int, int] | None = None,
    positions: Positions = "interpolated",
    heads: int | None = None,
) -> VisionTransformer:
    """Returns the encoder that the weights belong to, in eval mode; see `evaluate.frozen.load`.

    Raises:
        CheckpointError: the weights aren't an encoder that this package has.
        ConfigError: sizes don't fit, or are needed and missing.
    """
    encoder = build_encoder(**encoder_sizes(weights, image_size=image_size, positions=positions, heads=heads))
    if "fc_norm.weight" in weights.tensors and "norm.weight" not in weights.tensors:
        encoder.norm = nn.Identity()
        logger.info("%s: a classifier whose norm follows the pooling: its tokens come without a norm", weights.origin)
    _fill(encoder, weights)
    return encoder.eval()


def encoder_sizes(
    weights: Weights,
    *,
    image_size: int | tuple[int, int] | None = None,
    positions: Positions = "interpolated",
    heads: int | None = None,
) -> dict[str, Any]:
    """Returns the sizes that `build_encoder` takes; the arguments are those of `encoder_of_weights`.

    Raises:
        CheckpointError: the weights aren't an encoder that this package has.
        ConfigError: a size is needed and missing.
    """
    sizes = sizes_of_weights(weights)
    trained = positions_of(weights)
    if image_size is not None:
        sizes["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if heads is not None:
        check_heads(weights, heads)
        sizes["heads"] = heads
    for name in ("image_size", "heads"):
        if name not in sizes:
            raise ConfigError(
                f"{weights.origin} doesn't state the {name} of its encoder; give load(..., {name}=...), or "
                f"--{name.replace('_', '-')} where a command has it"
            )
    grid = tuple(side // sizes["patch_size"] for side in sizes["image_size"])
    if positions == "interpolated" and trained is not None and trained.computed_for != grid:
        sizes["position_grid"] = trained.computed_for
    if sizes["channels"] == 3:
        del sizes["channels"]  # the default
    return sizes


def classifier_config(weights: Weights) -> ClassifierConfig | None:
    """Returns the sizes of the classifier that the weights belong to; None if they have no head.

    Raises:
        CheckpointError: the weights aren't a classifier that this package has.
        ConfigError: a size is needed and missing.
    """
    head = weights.tensors.get("head.weight")
    if head is None:
        return None
    sizes = encoder_sizes(weights)
    width = weights.tensors[PATCHES].shape[0]
    known: dict[int, Literal["last", "last4"]] = {width: "last", 4 * width: "last4"}
    pooled = known.get(head.shape[-1]) if head.ndim == 2 else None
    if pooled is None:
        raise CheckpointError(
            f"{weights.origin}: its head.weight is {tuple(head.shape)}; this package's classifiers have a linear "
            f"head on {width} channels, or on the {4 * width} of 4 layers"
        )
    return ClassifierConfig(
        encoder=EncoderConfig(**sizes),
        num_classes=len(head),
        representation=pooled,
        pool_norm="after" if "fc_norm.weight" in weights.tensors else "before",
        drop_path=0.0,
    )


def classifier_of_weights(weights: Weights, config: ClassifierConfig) -> Classifier:
    """Returns the classifier that the weights belong to, in eval mode; `config` is that of `classifier_config`.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape.
    """
    classifier = build_classifier(config)
    _fill(classifier, weights, keep_head=True)
    return classifier.eval()


def predictor_of_source(source: WeightsSource) -> Predictor:
    """Returns the predictor of a source, in eval mode.

    Raises:
        CheckpointError: there is none, or no encoder with it that tells its sizes.
        ConfigError: a size is needed and missing.
    """
    tensors = source.predictor()
    if tensors is None:
        raise CheckpointError(
            f"{source.origin} holds no predictor; give a pretraining run, a checkpoint of one, or a published .pth.tar"
        )
    weights = source.encoder(source.roles[0] if source.roles else "target")
    sizes = encoder_sizes(weights)
    encoder = resolve(ModelConfig(**sizes))
    own: dict[str, Any] = {
        name: sizes[name] for name in ("name", "image_size", "patch_size", "position_grid") if name in sizes
    }
    own |= {name.removeprefix("predictor_"): size for name, size in predictor_sizes(tensors).items()}
    predictor = build_predictor(**own, encoder_width=encoder.width, heads=encoder.heads)
    fill_predictor(predictor, tensors, source.origin)
    return predictor.eval()


def _fill(module: VisionTransformer | Classifier, weights: Weights, *, keep_head: bool = False) -> None:
    for layer in module.modules():
        if isinstance(layer, LayerNorm) and weights.facts.norm_eps is not None:
            layer.eps = weights.facts.norm_eps
    logger.info("%s", fit(module, weights, keep_head=keep_head).text())
