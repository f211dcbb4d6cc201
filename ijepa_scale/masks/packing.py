"""Turns masks into packed sequences, by index arithmetic on the host. Must not know how masks are drawn.

Legend: E context blocks, M target blocks, B images, N patches of an image, C / R / P context, target
and predictor tokens of the whole pack. `PackedMasks` documents each result.
"""

from __future__ import annotations

import numpy as np
import torch

from ijepa_kernels.attention import SequenceLayout
from ijepa_scale.masks.group import GroupMasks, patches_of
from ijepa_scale.masks.types import DenseMasks, PackedMasks


def pack(masks: DenseMasks, num_patches: int) -> PackedMasks:
    """Returns the same masks as packed sequences. `masks` must be on the CPU; images have `num_patches` patches."""
    num_contexts, num_images, context_tokens = masks.context.shape
    return pack_indices(
        masks.context.numpy().ravel(),
        np.full((num_contexts, num_images), context_tokens),
        masks.targets.numpy().ravel(),
        np.full((masks.targets.shape[0], num_images), masks.targets.shape[2]),
        num_patches,
    )


def pack_groups(parts: list[GroupMasks]) -> PackedMasks:
    """Returns the masks of all parts' images, in order, as packed sequences."""
    context = np.concatenate([part.context for part in parts], axis=1)
    num_targets = len(parts[0].targets)
    targets = [part.targets[block].ravel() for block in range(num_targets) for part in parts]
    lengths = np.concatenate([np.full(part.targets.shape[1], part.targets.shape[2]) for part in parts])
    return pack_indices(
        patches_of(context),
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
        context: (C,) int64, the concatenated lists of all (e, b), with b varying fastest.
        context_lengths: (E, B), the length of each of these lists.
        targets: int64, the concatenated lists of all (i, b), with b varying fastest.
        target_lengths: (M, B), the length of each of these lists.
        num_patches: N.
    """
    num_contexts, num_images = context_lengths.shape
    num_targets = len(target_lengths)
    shape = (num_targets, num_contexts, num_images)
    context_of = np.broadcast_to(context_lengths, shape).ravel()  # number of context tokens in each predictor sequence
    target_of = np.broadcast_to(target_lengths[:, None], shape).ravel()
    image_of = np.broadcast_to(np.arange(num_images), shape).ravel()

    # A predictor sequence is a piece of the context tokens, then a piece of the target tokens. The target tokens are
    # already stored in the order of the predictor sequences.
    lengths = np.stack([context_of, target_of], axis=-1)
    begins = _starts(lengths.ravel()).reshape(lengths.shape)  # of each piece among the predictor tokens
    context_starts = np.broadcast_to(_starts(context_lengths.ravel()).reshape(context_lengths.shape), shape).ravel()
    sources = np.stack([context_starts, len(context) + _starts(target_of)], axis=-1)
    target_rows = np.repeat(begins[:, 1] - _starts(target_of), target_of)
    target_rows += np.arange(len(target_rows))
    predictor_source = np.repeat((sources - begins).ravel(), lengths.ravel())
    predictor_source += np.arange(len(predictor_source))

    blocks = np.split(targets, np.cumsum(target_lengths.sum(axis=1))[:-1])
    target_index = np.repeat(image_of * num_patches, target_of)
    target_index += np.concatenate([np.tile(block, num_contexts) for block in blocks])
    context_index = np.repeat(np.tile(np.arange(num_images) * num_patches, num_contexts), context_lengths.ravel())
    context_index += context
    share = 1.0 / (num_images * num_targets * num_contexts * target_of)
    return PackedMasks(
        context_index=_tensor(context_index),
        context_layout=SequenceLayout.of(context_lengths.ravel().tolist()),
        target_index=_tensor(target_index),
        predictor_layout=SequenceLayout.of((context_of + target_of).tolist()),
        predictor_source=_tensor(predictor_source),
        target_rows=_tensor(target_rows),
        target_layout=SequenceLayout.of(target_of.tolist()),
        weights=torch.from_numpy(np.repeat(share.astype(np.float32), target_of)),
    )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Returns the start of each list when lists of these lengths are concatenated."""
    return np.cumsum(lengths) - lengths


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))
