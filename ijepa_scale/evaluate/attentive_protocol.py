"""The attentive protocols: probes of 1 or 4 blocks on an encoder's patch tokens, stored or computed anew."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ijepa_scale.engine.world import World
from ijepa_scale.evaluate.attentive_probe import (
    AttentiveRecipe,
    LabelledTokens,
    attentive_predictions,
    attentive_sweep,
)
from ijepa_scale.evaluate.bar import Bar
from ijepa_scale.evaluate.frozen import ImageTransform, heads_of
from ijepa_scale.evaluate.labelled_sets import LabelledImages, LabelledSet
from ijepa_scale.evaluate.protocols import Score, scored
from ijepa_scale.evaluate.stored_features import FeatureStore
from ijepa_scale.models.vit import VisionTransformer

ATTENTIVE = {"attentive": 1, "attentive-4": 4}  # blocks of the probe
_BYTES = 2  # of a stored number, float16


def token_bytes(encoder: VisionTransformer, data: LabelledSet) -> int:
    """Returns the size of all tokens of a set in the store."""
    images = len(data.train.labels) + len(data.test.labels)
    return images * encoder.pos_embed.shape[1] * encoder.width * _BYTES


def attentive(
    name: str,
    data: LabelledSet,
    encoder: VisionTransformer,
    transform: ImageTransform,
    store: FeatureStore,
    stored: dict[str, np.ndarray],
    *,
    epochs: int,
    seed: int,
    world: World,
) -> list[Score]:
    """Returns the best of a sweep of attentive probes on process 0, nothing on the others. Communicates.

    `stored` are the tokens of both image sets by name, or none: then they are computed in each epoch.
    """

    def tokens(images: LabelledImages) -> LabelledTokens:
        def read(batches: list[np.ndarray]) -> Iterator[Tensor]:
            rows = stored.get(images.images.name)
            if rows is None:
                yield from store.tokens(encoder, transform, images.images, batches)
                return
            for batch in batches:
                yield torch.from_numpy(rows[batch]).to(world.device).float()

        return LabelledTokens(labels=images.labels, read=read)

    probes = attentive_sweep(ATTENTIVE[name])
    bar = Bar(name, "step", shown=world.is_main)
    predicted = attentive_predictions(
        tokens(data.train), tokens(data.test), probes, width=encoder.width, heads=heads_of(encoder),
        num_classes=data.num_classes, world=world, recipe=AttentiveRecipe(epochs=epochs, seed=seed),
        advance=bar.show,
    )  # fmt: skip
    if not world.is_main:
        return []
    right = (predicted == data.test.labels).sum(axis=1)
    best = int(right.argmax())
    note = f"best of {len(probes)} on the test images; centre crops instead of augmented ones"
    return [scored(name, probes[best].text(), int(right[best]), len(data.test.labels), note=note)]
