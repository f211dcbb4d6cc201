"""Bytes that a step reads and writes besides matrix products and attention. Knows no device.

All figures are counted, not measured on a GPU. For compiled blocks they are what Inductor generates for sm_80 and sm_90
at ViT-H's widths (`tests/lowering`). For eager operations each tensor counts once per operation.
"""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.architectures import Architecture
from ijepa_scale.planning.parameters import ParameterCounts
from ijepa_scale.planning.spread import Spread
from ijepa_scale.planning.tokens import Tokens


@dataclass(frozen=True)
class BlockTraffic:
    """Bytes per token and channel of a block: norms, GELU, residual stream, casts, gradients of biases."""

    forward: float
    backward: float


COMPILED = BlockTraffic(forward=42.0, backward=96.0)
EAGER = BlockTraffic(forward=64.0, backward=126.0)
FP8_FORWARD = 39.0  # of the compiled target: GELU and norms write fp8
# A last block with a share q of its tokens as queries: its first norm takes all tokens, the rest only these.
LAST_BLOCK = {"forward": (6.0, 42.0), "backward": (22.5, 78.0)}  # of all tokens, of the queries
CASTS = BlockTraffic(forward=6.0, backward=6.0)  # per trained parameter: bf16 copies, and their gradients to fp32
OUTSIDE = {False: 124.0, True: 155.0}  # outside blocks, per patch and channel of whole images; by `Tokens.packed`
# Per parameter, once a step: AdamW reads four fp32 numbers and writes three, and the norm reads the gradients. The
# target's update reads two and writes one, and renews its bf16 copies. In one pass weights are read once, and those of
# the context are rounded too.
OPTIMIZER, TARGET = 32.0, 18.0
FUSED_OPTIMIZER, FUSED_TARGET, LOW_COPY = 32.0, 10.0, 2.0
FP8_COPY, FUSED_FP8_COPY = 27.0 - 6.0, -1.0  # more than the bf16 copy; eager quantisation takes several passes


def micro_batch_bytes(
    sizes: Architecture,
    tokens: Tokens,
    counts: ParameterCounts,
    *,
    compiled: bool,
    fp8: bool,
    casts: bool,
    checkpointing: str,
) -> float:
    """Returns the bytes of forward and backward of one micro-batch in bf16.

    With `casts` the trained weights are cast in each micro-batch. Selective checkpointing repeats the forward's
    bytes. What full checkpointing repeats isn't counted.
    """
    traffic = COMPILED if compiled else EAGER
    again = traffic.forward if checkpointing == "selective" else 0.0
    trained = traffic.forward + again + traffic.backward
    scale = traffic.forward / COMPILED.forward
    target = tokens.images * tokens.patches * sizes.width
    frozen = FP8_FORWARD if fp8 and compiled else traffic.forward
    found = target * (frozen * (sizes.depth - 1) + scale * _last("forward", tokens.wanted / tokens.patches))
    found += tokens.context * sizes.width * trained * sizes.depth
    share = tokens.predicted / tokens.predictor
    last = scale * (_last("forward", share) + _last("backward", share))
    found += tokens.predictor * sizes.predictor_width * (trained * (sizes.predictor_depth - 1) + last)
    found += (CASTS.forward + CASTS.backward) * counts.trainable * casts
    return found + OUTSIDE[tokens.packed] * target


def update_bytes(counts: ParameterCounts, spread: Spread, *, fp8: bool) -> float:
    """Returns the bytes of optimiser and target update on one process, once a step."""
    shards = spread.shards if spread.strategy == "fsdp2" or spread.stage else 1
    held = 1 if spread.target_replicated else spread.shards
    if spread.renews_copies:
        optimizer = FUSED_OPTIMIZER + LOW_COPY * spread.lasting_copies
        target = FUSED_TARGET + FUSED_FP8_COPY * fp8
    else:
        optimizer, target = OPTIMIZER, TARGET + FP8_COPY * fp8
    return optimizer * counts.trainable / shards + target * counts.target / held


def classifier_bytes(
    sizes: Architecture,
    tokens: float,
    trained: int,
    *,
    frozen: int,
    compiled: bool,
    casts: bool,
    checkpointing: str,
) -> float:
    """Returns the bytes of forward and backward of one micro-batch of a classifier in bf16; see `micro_batch_bytes`.

    `tokens` are those of all images, `trained` the trained parameters, `frozen` the blocks that only run forward.
    """
    traffic = COMPILED if compiled else EAGER
    again = traffic.forward if checkpointing == "selective" else 0.0
    each = traffic.forward * sizes.depth + (again + traffic.backward) * (sizes.depth - frozen)
    return tokens * sizes.width * (each + OUTSIDE[False]) + (CASTS.forward + CASTS.backward) * trained * casts


def classifier_update_bytes(trained: int, averaged: int, spread: Spread) -> float:
    """Returns the bytes of the optimiser and of averaging weights on one process, once a step."""
    shards = spread.shards if spread.strategy == "fsdp2" or spread.stage else 1
    if spread.renews_copies:
        return (
            FUSED_OPTIMIZER + LOW_COPY * spread.lasting_copies
        ) * trained / shards + FUSED_TARGET * averaged / shards
    return (OPTIMIZER * trained + TARGET * averaged) / shards


def _last(direction: str, share: float) -> float:
    """Returns the bytes of a compiled last block per token and channel of its input, if `share` are queries."""
    every, queries = LAST_BLOCK[direction]
    return every + queries * share
