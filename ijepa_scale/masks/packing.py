"""Masks as packed sequences: which token goes where, computed on the host. Floor 1: index arithmetic only.

Legend: E context blocks, M target blocks, B images, N patches of an image, C / R / P context, target
and predictor tokens of the whole pack. `PackedMasks` says what each result means.
"""

from __future__ import annotations

import numpy as np
import torch

from ijepa_kernels.attention import SequenceLayout
from ijepa_scale.masks.group import GroupMasks
from ijepa_scale.masks.types import DenseMasks, PackedMasks


def pack(masks: DenseMasks, num_patches: int) -> PackedMasks:
    """Returns the same masks as packed sequences; `masks` must lie on the CPU, images have `num_patches` patches."""
    num_contexts, num_images, context_tokens = masks.context.shape
    return pack_indices(
        masks.context.numpy().ravel(),
        np.full((num_contexts, num_images), context_tokens),
        masks.targets.numpy().ravel(),
        np.full((masks.targets.shape[0], num_images), masks.targets.shape[2]),
        num_patches,
    )


def pack_groups(parts: list[GroupMasks]) -> PackedMasks:
    """Returns the masks of the images of all parts, in their order, as packed sequences."""
    context = np.concatenate([part.context for part in parts], axis=1)
    num_targets = len(parts[0].targets)
    targets = [part.targets[block].ravel() for block in range(num_targets) for part in parts]
    lengths = np.concatenate([np.full(part.targets.shape[1], part.targets.shape[2]) for part in parts])
    return pack_indices(
        np.nonzero(context)[2],
        context.sum(axis=2),
        np.concatenate(targets),
        np.broadcast_to(lengths, (num_targets, len(lengths))),
        context.shape[2],
    )


def pack_indices(
    context: np.ndarray,
    context_lengths: np.ndarray,
    targets: np.ndarray,
    target_lengths: np.ndarray,
    num_patches: int,
) -> PackedMasks:
    """Returns packed masks from one list of patches per block and image.

    Args:
        context: the lists of all (e, b), b fastest, one after another (C,) int64.
        context_lengths: how long each of them is (E, B).
        targets: the lists of all (i, b), b fastest, one after another.
        target_lengths: how long each of them is (M, B).
        num_patches: N.
    """
    num_contexts, num_images = context_lengths.shape
    num_targets = len(target_lengths)
    shape = (num_targets, num_contexts, num_images)
    context_of = np.broadcast_to(context_lengths, shape).ravel()  # context tokens of each predictor sequence
    target_of = np.broadcast_to(target_lengths[:, None], shape).ravel()
    image_of = np.broadcast_to(np.arange(num_images), shape).ravel()

    # Where each predictor sequence begins, and where its two lists begin among the lists given.
    total = context_of + target_of
    starts = _starts(total)
    context_starts = np.broadcast_to(_starts(context_lengths.ravel()).reshape(context_lengths.shape), shape).ravel()
    target_starts = np.broadcast_to(_starts(target_lengths.ravel()).reshape(num_targets, 1, num_images), shape).ravel()
    within_target = np.arange(target_of.sum()) - np.repeat(_starts(target_of), target_of)
    target_rows = np.repeat(starts + context_of, target_of) + within_target
    target_list = np.repeat(target_starts, target_of) + within_target
    source = np.arange(total.sum()) + np.repeat(context_starts - starts, total)  # right for the context tokens
    source[target_rows] = len(context) + np.arange(len(target_rows))

    share = 1.0 / (num_images * num_targets * num_contexts * target_of)
    context_image = np.repeat(np.tile(np.arange(num_images), num_contexts), context_lengths.ravel())
    return PackedMasks(
        context_index=_tensor(context_image * num_patches + context),
        context_layout=SequenceLayout.of(context_lengths.ravel().tolist()),
        target_index=_tensor(np.repeat(image_of, target_of) * num_patches + targets[target_list]),
        predictor_layout=SequenceLayout.of(total.tolist()),
        predictor_source=_tensor(source),
        target_rows=_tensor(target_rows),
        target_layout=SequenceLayout.of(target_of.tolist()),
        weights=torch.from_numpy(np.repeat(share, target_of).astype(np.float32)),
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Returns where each of the lists of these lengths begins when they lie one after another."""
    return np.cumsum(lengths) - lengths


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))
