"""Packed masks written token by token from their definition, and small models for the tests of this folder."""

import torch

import ijepa_scale
from ijepa_kernels.attention import SequenceLayout
from ijepa_scale.masks.types import DenseMasks, PackedMasks
from ijepa_scale.models import JEPA

SIZES = {"image_size": (16, 24), "patch_size": 4, "heads": 2}  # a grid of 4 rows and 6 columns
NUM_PATCHES = 24


def small_jepa(shake=0.2):
    """A JEPA of 2 + 2 blocks whose biases and norms aren't trivial either."""
    encoder = ijepa_scale.build_encoder("vit_tiny", width=16, depth=2, **SIZES)
    predictor = ijepa_scale.build_predictor("vit_tiny", encoder_width=16, width=8, depth=2, **SIZES)
    jepa = JEPA(encoder, predictor)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in jepa.parameters():
            parameter += shake * torch.randn(parameter.shape, generator=generator)
    return jepa


def images_of(count):
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(9))


def random_masks(num_context, num_targets, num_images, kept=7, predicted=3):
    generator = torch.Generator().manual_seed(1)

    def draw(blocks, count):
        scores = torch.rand(blocks, num_images, NUM_PATCHES, generator=generator)
        return scores.argsort(-1)[..., :count].sort(-1).values

    return DenseMasks(draw(num_context, kept), draw(num_targets, predicted))


def pack_by_hand(context, targets):
    """PackedMasks of nested lists of places: context[e][b] and targets[i][b]."""
    num_images = len(context[0])
    context_index, context_lengths, first = [], [], {}
    for e, block in enumerate(context):
        for b, places in enumerate(block):
            first[e, b] = len(context_index)
            context_index += [b * NUM_PATCHES + place for place in places]
            context_lengths.append(len(places))
    target_index, weights, source, lengths, rows, asked = [], [], [], [], [], []
    for block in targets:
        for e in range(len(context)):
            for b in range(num_images):
                source += [first[e, b] + n for n in range(len(context[e][b]))]
                for place in block[b]:
                    rows.append(len(source))
                    source.append(len(context_index) + len(target_index))
                    target_index.append(b * NUM_PATCHES + place)
                    weights.append(1 / (num_images * len(targets) * len(context) * len(block[b])))
                lengths.append(len(context[e][b]) + len(block[b]))
                asked.append(len(block[b]))
    return PackedMasks(
        context_index=torch.tensor(context_index),
        context_layout=SequenceLayout.of(context_lengths),
        target_index=torch.tensor(target_index),
        predictor_layout=SequenceLayout.of(lengths),
        predictor_source=torch.tensor(source),
        target_rows=torch.tensor(rows),
        target_layout=SequenceLayout.of(asked),
        weights=torch.tensor(weights),
    )


UNEVEN_CONTEXT = [[[0, 1, 2, 9, 20], [5], [3, 4, 8, 11]]]
UNEVEN_TARGETS = [[[7, 8], [6, 7, 12, 13], [0, 1]], [[23], [22, 23], [16, 17, 22, 23]]]
