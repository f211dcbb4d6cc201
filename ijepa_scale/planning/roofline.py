"""Estimates the MFU of a step in bf16 from its matrix products, its attention and its memory traffic.

The FLOPs and bytes are counted; the shares of the peaks that kernels reach are assumptions, given as ranges. So an
estimate is a range too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ijepa_scale.config.architectures import Architecture, resolve
from ijepa_scale.config.finetune_run import ClassifierConfig
from ijepa_scale.config.schema import MaskConfig, ModelConfig
from ijepa_scale.planning.devices import Device
from ijepa_scale.planning.flops import FlopCount
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.spread import Spread
from ijepa_scale.planning.tokens import Tokens
from ijepa_scale.planning.traffic import classifier_bytes, classifier_update_bytes, micro_batch_bytes, update_bytes

Range = tuple[float, float]  # low, high


@dataclass(frozen=True)
class Reach:
    """Shares of a GPU's peak of dense bf16 products that kernels reach: assumptions, to be replaced by measurements."""

    wide: Range  # products of width 1280 and more
    narrow: Range  # products of width 384 and less
    attention: Range  # the forward of flash attention, without padding


# Not measured here. Hopper's peak is further from what kernels reach than Ampere's.
_REACH = {
    "a100": Reach(wide=(0.76, 0.85), narrow=(0.48, 0.60), attention=(0.45, 0.55)),
    "h100": Reach(wide=(0.62, 0.72), narrow=(0.34, 0.45), attention=(0.28, 0.35)),
}
_LIKE = {"a800": "a100", "h800": "h100", "h200": "h100"}
_OTHERS = Reach(wide=(0.55, 0.80), narrow=(0.30, 0.55), attention=(0.25, 0.50))
_MEMORY: Range = (0.80, 0.90)  # share of the memory's bandwidth
_BACKWARD = 0.6  # of attention's share if there is a backward, and again if heads are this narrow:
_NARROW_HEAD = 32
_ATTENTION_BACKWARD = 2.5  # FLOPs of flash attention's backward / forward: it computes the scores again
_FP8_GAIN: Range = (1.3, 1.6)  # how much faster the target's products are in fp8


def estimate_mfu(
    model: ModelConfig,
    device: Device,
    spread: Spread,
    *,
    masks: MaskConfig,
    tokens: Tokens,
    flops: FlopCount,
    compiled: bool,
    fp8: bool = False,
    checkpointing: str = "none",
) -> Range:
    """Returns the lowest and the highest MFU of a step in bf16 that the assumptions allow.

    `tokens` are those of a mean micro-batch, and `flops` the nominal FLOPs per image, to which MFU refers. Work that
    full checkpointing repeats isn't part of the estimate.
    """
    sizes, counts = resolve(model), count_parameters(model)
    casts = not spread.lasting_copies
    moved = micro_batch_bytes(
        sizes, tokens, counts, compiled=compiled, fp8=fp8, casts=casts, checkpointing=checkpointing
    )
    moved += update_bytes(counts, spread, fp8=fp8) / spread.accumulation
    found = []
    for end in (0, 1):
        reach = _reach(device)
        seconds = moved / (_MEMORY[end] * device.memory_bandwidth)
        for work, share in _work(sizes, masks, tokens, reach=reach, end=end, fp8=fp8):
            seconds += work / (share * device.peak_flops)
        found.append(tokens.images * flops.total / (seconds * device.peak_flops))
    return found[0], found[1]


def estimate_finetune_mfu(
    model: ClassifierConfig,
    device: Device,
    spread: Spread,
    *,
    images: float,
    flops: FlopCount,
    compiled: bool,
    checkpointing: str,
    parameters: tuple[int, int],
) -> Range:
    """Returns the same for a classifier. `parameters` are the trained ones, and those of averaged weights.

    Outside blocks as much is read and written as in pretraining, which is an upper bound.
    """
    sizes = resolve(model.pretrained)
    tokens, trained_blocks = images * sizes.num_patches, sizes.depth - model.frozen_blocks
    casts = not spread.lasting_copies
    moved = classifier_bytes(
        sizes, tokens, parameters[0], frozen=model.frozen_blocks, compiled=compiled, casts=casts,
        checkpointing=checkpointing,
    )  # fmt: skip
    moved += classifier_update_bytes(*parameters, spread) / spread.accumulation
    linears = _linears(tokens, sizes.width, sizes.mlp_width)
    attention = _attention(images, sizes.num_patches, sizes.width, sizes.width // sizes.heads)
    patches = 2 * sizes.channels * sizes.patch_size**2 * sizes.width * tokens * (1 if model.frozen_blocks else 2)
    found = []
    for end in (0, 1):
        reach = _reach(device)
        products = _products(reach, sizes.width, end)
        work = [
            (linears * (sizes.depth + 2 * trained_blocks) + patches, products),
            (attention * model.frozen_blocks, reach.attention[end]),
            ((1 + _ATTENTION_BACKWARD) * attention * trained_blocks, reach.attention[end] * _BACKWARD),
        ]
        seconds = moved / (_MEMORY[end] * device.memory_bandwidth)
        seconds += sum(operations / (share * device.peak_flops) for operations, share in work)
        found.append(images * flops.total / (seconds * device.peak_flops))
    return found[0], found[1]


def _work(
    sizes: Architecture, masks: MaskConfig, tokens: Tokens, *, reach: Reach, end: int, fp8: bool
) -> list[tuple[float, float]]:
    """Returns (FLOPs that are computed, share of the peak at which) for each kind of product in a micro-batch."""
    width, mlp, narrow, narrow_mlp = sizes.width, sizes.mlp_width, sizes.predictor_width, sizes.predictor_mlp_width
    wide, small = (_products(reach, each, end) for each in (width, narrow))
    everything = tokens.images * tokens.patches
    patch = 2 * sizes.channels * sizes.patch_size**2 * width
    wanted = tokens.images * tokens.wanted
    target = _linears(everything, width, mlp) * (sizes.depth - 1) + _last_linears(everything, wanted, width, mlp)
    context = 3 * _linears(tokens.context, width, mlp) * sizes.depth
    predictor = _linears(tokens.predictor, narrow, narrow_mlp) * (sizes.predictor_depth - 1)
    predictor += _last_linears(tokens.predictor, tokens.predicted, narrow, narrow_mlp)
    predictor += 2 * width * narrow * (tokens.context + tokens.predicted)
    contexts = tokens.images * masks.num_context_blocks
    sequences = contexts * masks.num_target_blocks
    head, narrow_head = width // sizes.heads, narrow // sizes.heads
    trained = reach.attention[end] * _BACKWARD
    by_head = trained * (_BACKWARD if narrow_head <= _NARROW_HEAD else 1.0)
    return [
        (target, wide * (_FP8_GAIN[end] if fp8 else 1.0)),
        (context + patch * (everything + 2 * tokens.context), wide),
        (3 * predictor, small),
        (_attention(tokens.images, tokens.patches, width, head) * sizes.depth, reach.attention[end]),
        (
            (1 + _ATTENTION_BACKWARD) * _attention(contexts, tokens.context / contexts, width, head) * sizes.depth,
            trained,
        ),
        (
            (1 + _ATTENTION_BACKWARD)
            * _attention(sequences, tokens.predictor / sequences, narrow, narrow_head)
            * sizes.predictor_depth,
            by_head,
        ),
    ]


def _reach(device: Device) -> Reach:
    family = device.name.partition("-")[0]
    return _REACH.get(_LIKE.get(family, family), _OTHERS)


def _products(reach: Reach, width: int, end: int) -> float:
    """Returns the share that products of this width reach: between narrow and wide ones by the width's logarithm."""
    place = math.log(width / 384) / math.log(1280 / 384)
    place = min(1.0, max(0.0, place))
    return reach.narrow[end] + place * (reach.wide[end] - reach.narrow[end])


def _linears(tokens: float, width: int, mlp_width: int) -> float:
    return 2 * tokens * (4 * width**2 + 2 * width * mlp_width)


def _last_linears(tokens: float, queries: float, width: int, mlp_width: int) -> float:
    """Returns the FLOPs of a last block: keys and values of all tokens, the rest of the queries only."""
    return 4 * tokens * width**2 + 2 * queries * (2 * width**2 + 2 * width * mlp_width)


def _attention(sequences: float, length: float, width: int, head_dim: int) -> float:
    """Returns the FLOPs of attention's forward; the kernel pads heads to a multiple of 32."""
    return 4 * sequences * length**2 * width * (math.ceil(head_dim / 32) * 32 / head_dim)
