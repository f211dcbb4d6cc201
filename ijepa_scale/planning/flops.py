"""Counts the floating-point operations of one training image in closed form. Builds no model.

Counts only matrix products, the patch convolution and attention, with two operations per multiply-add, unpadded heads
and no recomputation. This agrees with torch's FlopCounterMode on the math attention backend. The FlopCounterMode
counts flash kernels differently (backward as 2.5 x forward, nothing on the CPU) and misses oneDNN's products in fp32
linear layers on the CPU, so use it on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ijepa_scale.config.architectures import Architecture, resolve
from ijepa_scale.config.schema import ModelConfig
from ijepa_scale.masks.types import DenseMasks, Masks

_BACKWARD = 2  # FLOPs of backward / forward, if the input needs a gradient


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """FLOPs per image: of the target's forward, and of forward and backward of the trained parts."""

    target: float
    context: float
    predictor: float

    @property
    def total(self) -> float:
        """The FLOPs of one image in one training step."""
        return self.target + self.context + self.predictor


def train_flops(
    model: ModelConfig,
    *,
    context_tokens: int | Sequence[int],
    target_tokens_per_block: int | Sequence[int],
    num_targets: int = 4,
    num_context: int = 1,
) -> FlopCount:
    """Returns the FLOPs of one image in one training step; for packed sequences, the mean over the images.

    `context_tokens` is the length of every context sequence, or a list of lengths in the order (context
    block, image), with images varying fastest; `target_tokens_per_block` is one length, or one per image.

    Raises:
        ValueError: the lengths of the lists don't match.
    """
    contexts = [context_tokens] * num_context if isinstance(context_tokens, int) else list(context_tokens)
    num_images, rest = divmod(len(contexts), num_context)
    if isinstance(target_tokens_per_block, int):
        target_tokens_per_block = [target_tokens_per_block] * num_images
    targets = list(target_tokens_per_block)
    if rest or not num_images or len(targets) != num_images:
        raise ValueError(
            f"{len(contexts)} context lengths and {len(targets)} target lengths don't match {num_context} context "
            "blocks per image; give one context length per context block and image, and one target length per image"
        )
    pairs = [(context, targets[index % num_images]) for index, context in enumerate(contexts)]
    return _count(
        resolve(model),
        num_images=num_images,
        contexts=contexts,
        sequences=[context + target for context, target in pairs] * num_targets,
        predicted=num_targets * sum(target for _, target in pairs),
    )


def mask_flops(model: ModelConfig, masks: Masks, *, num_images: int) -> FlopCount:
    """Returns the FLOPs per image of a training step with these masks of `num_images` images. Doesn't synchronise."""
    if isinstance(masks, DenseMasks):
        num_context, num_images, kept = masks.context.shape
        num_targets, _, predicted = masks.targets.shape
        rows = num_targets * num_context * num_images
        contexts, sequences = [kept] * (num_context * num_images), [kept + predicted] * rows
        predicted *= rows
    else:
        contexts, sequences = list(masks.context_layout.lengths), list(masks.predictor_layout.lengths)
        predicted = masks.target_rows.shape[0]
    return _count(resolve(model), num_images=num_images, contexts=contexts, sequences=sequences, predicted=predicted)


def encoder_forward_flops(model: ModelConfig) -> float:
    """Returns the FLOPs of the encoder's forward on all tokens of one image."""
    sizes = resolve(model)
    tokens = sizes.num_patches
    return _patches(sizes) + _blocks([tokens], sizes.width, sizes.mlp_width, sizes.depth)


def forward_flops(model: ModelConfig, count: FlopCount) -> float:
    """Returns the FLOPs of one image in the forward of context encoder and predictor, of those in a training step."""
    patches = _patches(resolve(model))
    return patches + (count.context - 2 * patches + count.predictor) / (1 + _BACKWARD)


def finetune_flops(model: ModelConfig, *, frozen_blocks: int = 0) -> float:
    """Returns the FLOPs of one image in one finetuning step, not counting the head and the pooling.

    Frozen blocks, and the patch embedding before them, only run forward.
    """
    sizes = resolve(model)
    trained = _blocks([sizes.num_patches], sizes.width, sizes.mlp_width, sizes.depth - frozen_blocks)
    patches = 0.0 if frozen_blocks else _patches(sizes)
    return encoder_forward_flops(model) + patches + _BACKWARD * trained


def _count(
    sizes: Architecture, *, num_images: int, contexts: Sequence[int], sequences: Iterable[int], predicted: int
) -> FlopCount:
    """Returns the counts per image, given the sequence lengths of all `num_images` images."""
    width, narrow = sizes.width, sizes.predictor_width
    target = _patches(sizes) + _blocks([sizes.num_patches], width, sizes.mlp_width, sizes.depth)
    # all patches are embedded before masking; images need no gradient, so backward only computes the weights'
    context = 2 * _patches(sizes)
    context += (1 + _BACKWARD) * _blocks(contexts, width, sizes.mlp_width, sizes.depth) / num_images
    linears = 2 * width * narrow * (sum(contexts) + predicted)
    blocks = _blocks(sequences, narrow, sizes.predictor_mlp_width, sizes.predictor_depth)
    return FlopCount(target=target, context=context, predictor=(1 + _BACKWARD) * (linears + blocks) / num_images)


def _patches(sizes: Architecture) -> float:
    """Returns the forward FLOPs of the patch convolution on one image."""
    return 2 * sizes.num_patches * sizes.width * sizes.channels * sizes.patch_size**2


def _blocks(lengths: Iterable[int], width: int, mlp_width: int, depth: int) -> float:
    """Returns the forward FLOPs of `depth` blocks on sequences of these lengths, each attending only to itself."""
    lengths = list(lengths)
    linear = 2 * sum(lengths) * (4 * width**2 + 2 * width * mlp_width)
    attention = 4 * width * sum(n * n for n in lengths)
    return depth * (linear + attention)
