"""Formulas for the peak memory of one process in a step, and for what fits on a device.

Once masks have been drawn, thousands of settings can be evaluated per second. `spread.Spread` describes how the step
is spread over processes, `tokens.Tokens` the tokens of a micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.schema import MaskConfig, ModelConfig
from ijepa_scale.planning.activations import BF16_BYTES, Activations, activations
from ijepa_scale.planning.communication import Buffers, buffers
from ijepa_scale.planning.devices import Device
from ijepa_scale.planning.memory import FP32_BYTES, StateBytes, spread_states
from ijepa_scale.planning.parameters import count_parameters
from ijepa_scale.planning.spread import Spread
from ijepa_scale.planning.tokens import Tokens, draw_masks, mean_tokens, micro_batches

# The share of a device's memory that PyTorch can allocate; the CUDA context, the libraries' workspaces and
# fragmentation take the rest. An assumption, not a measurement.
USABLE_SHARE = 0.92


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one process on its device. `peak` isn't the sum: activations are freed while gradients grow."""

    weights: float  # with their bf16 copies, if the optimiser keeps them
    gradients: float
    optimizer: float
    target: float  # with its bf16 copies, if the engine keeps them
    activations: float  # kept for backward, with images and target features
    buffers: float  # for communication, and the memory pool of a CUDA graph
    peak: float
    moment: str  # the moment of the step at which the peak is reached

    @property
    def states(self) -> float:
        """The bytes of weights, gradients, optimiser and target together."""
        return self.weights + self.gradients + self.optimizer + self.target

    def fits(self, device: Device) -> bool:
        """Returns whether the peak fits into the memory that tensors may take on the device."""
        return self.peak <= usable_bytes(device)


def usable_bytes(device: Device) -> float:
    """Returns the bytes that tensors may take on the device."""
    return USABLE_SHARE * device.memory_bytes


def footprint(
    model: ModelConfig,
    tokens: Tokens,
    spread: Spread,
    *,
    checkpointing: str = "none",
    device: str = "cuda",
    cuda_graphs: bool = False,
) -> Footprint:
    """Returns the bytes of one process that trains on micro-batches of `tokens`.

    With `cuda_graphs`, the target's forward uses a separate memory pool, which stays reserved during the whole run,
    and a copy of the images. A sharded target has no graph, so nothing is counted for it.
    """
    counts = count_parameters(model)
    resharded = replace(spread, reshard_after_forward=True)  # what stays gathered counts as a buffer
    held = spread_states(counts.trainable, counts.target, resharded)
    work = activations(
        model,
        tokens,
        precision=spread.precision,
        checkpointing=checkpointing,
        casts=spread.autocast_copies,
        device=device,
    )
    copies = target_copy_bytes(model, spread)
    weights = held.weights + weight_copy_bytes(model, spread)
    images = image_bytes(model, tokens.images)
    return footprint_of(
        replace(held, weights=weights, target=held.target + copies),
        work,
        buffers(model, spread),
        spread,
        images=images,
        graph=work.target_work + images if cuda_graphs and spread.target_replicated else 0.0,
        predictor=counts.predictor / counts.trainable,
    )


def footprint_of(
    held: StateBytes,
    work: Activations,
    moving: Buffers,
    spread: Spread,
    *,
    images: float,
    graph: float = 0.0,
    predictor: float = 0.0,
) -> Footprint:
    """Returns the bytes of one process with these states, activations and buffers.

    `images` are the bytes of a micro-batch's images, `graph` those of a graph's memory pool, and `predictor` is its
    share of the gradients, which are the first in backward.
    """
    gradients = held.gradients + moving.gradients
    lasting = spread.strategy == "ddp" or spread.accumulation > 1 or spread.stage == 3
    base = held.weights + held.optimizer + held.target + moving.permanent + graph
    moments = _moments(work, moving, gradients=gradients, lasting=lasting, predictor=predictor)
    moments["input"] = (gradients if lasting else 0.0) + 2 * images  # augmented
    moment = max(moments, key=lambda name: moments[name])
    return Footprint(
        weights=held.weights,
        gradients=gradients,
        optimizer=held.optimizer,
        target=held.target,
        activations=work.inputs + work.kept,
        buffers=moving.largest + graph,
        peak=base + moments[moment],
        moment=moment,
    )


def target_copy_bytes(model: ModelConfig, spread: Spread) -> float:
    """Returns the bytes of the bf16 copies of the target's weights, which engines that replicate the target keep.

    This is an upper bound for an fp8 target, which has fewer copies.
    """
    if spread.precision != "bf16" or not spread.target_replicated:
        return 0.0
    sizes = resolve(model)
    return BF16_BYTES * (count_parameters(model).target - _norm_weights(sizes.width, sizes.depth))


def weight_copy_bytes(model: ModelConfig, spread: Spread) -> float:
    """Returns the bytes of the bf16 copies of the trained weights that last from step to step."""
    if not spread.lasting_copies:
        return 0.0
    sizes = resolve(model)
    alone = _norm_weights(sizes.width, sizes.depth) + sizes.predictor_width  # the mask token has no copy either
    alone += _norm_weights(sizes.predictor_width, sizes.predictor_depth)
    return BF16_BYTES * (count_parameters(model).trainable - alone)


def _norm_weights(width: int, depth: int) -> int:
    """Returns the number of weights in a network's norms, which stay fp32."""
    return 2 * width * (2 * depth + 1)


@functools.lru_cache(maxsize=256)
def usual_tokens(
    masks: MaskConfig, grid: tuple[int, int], *, micro_batch: int, batch_size: int, seed: int = 0
) -> tuple[Tokens, Tokens]:
    """Returns the mean and the largest of the drawn micro-batches.

    Raises:
        ConfigError: the masks can't be drawn on this grid.
    """
    parts = micro_batches(masks, draw_masks(masks, grid, batch_size=batch_size, seed=seed), grid, micro_batch)
    return mean_tokens(parts), max(parts, key=lambda part: part.predictor + part.context)


def largest_micro_batch(
    model: ModelConfig,
    masks: MaskConfig,
    spread: Spread,
    *,
    checkpointing: str,
    device: Device,
    batch_size: int,
    cuda_graphs: bool = False,
) -> int:
    """Returns the largest number of images in a micro-batch that fits, up to a process's share of the batch, or 0.

    Raises:
        ConfigError: the masks can't be drawn on this grid.
    """

    def fits(size: int) -> bool:
        _, largest = usual_tokens(masks, model.grid, micro_batch=size, batch_size=batch_size)
        needed = footprint(model, largest, spread, checkpointing=checkpointing, cuda_graphs=cuda_graphs)
        return needed.fits(device)

    return largest_that(fits, max(1, batch_size // spread.world))


def largest_that(fits: Callable[[int], bool], most: int) -> int:
    """Returns the largest number up to `most` that fits, or 0; what fits a number must fit all below it."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def image_bytes(model: ModelConfig, images: float) -> float:
    """Returns the bytes of so many images in fp32."""
    sizes = resolve(model)
    return FP32_BYTES * images * sizes.channels * sizes.num_patches * sizes.patch_size**2


def _moments(
    work: Activations, moving: Buffers, *, gradients: float, lasting: bool, predictor: float
) -> dict[str, float]:
    """Returns the bytes allocated on top of weights, optimiser and target at each moment that can be the peak.

    `lasting` gradients are allocated from the first micro-batch to the step. Others grow during backward, starting
    with the predictor's, whose share of the gradients is `predictor`.
    """
    before = gradients if lasting else 0.0
    growing = 0.0 if lasting else gradients
    encoder = before + work.inputs + work.encoder
    inner = encoder + work.predictor - work.predictor_tail  # at the last block that runs on all tokens
    busy = moving.gathered + moving.forward + max(work.weight_casts, work.kept_casts)
    back = moving.gathered + moving.backward + work.kept_casts
    return {
        "target's forward": before + work.inputs + work.target_work + moving.target,
        "encoder's forward": encoder - work.encoder_tail + work.encoder_work + busy,
        "predictor's forward": inner + work.predictor_work + busy,
        "loss": encoder + work.predictor + work.loss + work.loss_work + moving.gathered + work.kept_casts,
        "predictor's backward": inner + work.predictor_block + back,
        "encoder's backward": encoder - work.encoder_tail + work.encoder_block + back + predictor * growing,
        "backward's end": before + work.inputs + work.encoder_block + growing + moving.gathered + moving.backward,
        "step": gradients + moving.backward,
    }
