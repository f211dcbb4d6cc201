"""For MTEB's image tasks (mteb 2): `mteb.evaluate(ImageEncoder("runs/mine"), mteb.get_tasks(["MNIST"]))`."""

from typing import Any

import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from ijepa_scale.checkpoint.digests import digest_of_tensors
from ijepa_scale.evaluate.frozen import features, load


class ImageEncoder(AbsEncoder):
    """The mean patch token of what `ijepa_scale.load` reads; `options` go to it. Takes images, and no text."""

    def __init__(self, source: str, *, device: str = "cpu", **options: Any) -> None:
        encoder, self.transform = load(source, **options)
        digest, self.model = digest_of_tensors(encoder.state_dict()), encoder.to(device)  # MTEB keeps results by it
        facts = {"name": "ijepa_scale/encoder", "revision": digest, "modalities": ["image"]}
        self.mteb_model_meta = ModelMeta.create_empty(facts)

    def encode(self, inputs: Any, **_: Any) -> torch.Tensor:
        """Returns the features (N, D) float32 of a loader of batches."""
        return torch.cat([features(self.model, each["image"], transform=self.transform).cpu() for each in inputs])
