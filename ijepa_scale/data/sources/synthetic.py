"""Noise images for benchmarks and tests."""

from __future__ import annotations

import numpy as np

from ijepa_scale import rng
from ijepa_scale.data.sources.scan import Problems


class SyntheticSource:
    """Noise images that cost next to nothing: windows of one fixed texture."""

    _SHARD = 1024
    _CLASSES = 1000

    def __init__(self, num_samples: int, image_size: tuple[int, int] = (256, 256), seed: int = 0) -> None:
        self.num_samples = num_samples
        full, rest = divmod(num_samples, self._SHARD)
        self.shard_sizes = np.array([self._SHARD] * full + [rest] * bool(rest), dtype=np.int64)
        self.classes: list[str] | None = None
        self.fingerprint = f"synthetic-{num_samples}-{image_size[0]}x{image_size[1]}-{seed}"
        self._shape = (*image_size, 3)
        self._bytes = image_size[0] * image_size[1] * 3
        texture = np.random.Generator(np.random.Philox(key=rng.key(seed, "synthetic")))
        self._texture = texture.integers(0, 256, 2 * self._bytes + 1, dtype=np.uint8)

    def read(self, sample_id: int) -> np.ndarray:
        """Returns a read-only view of the pixels, (H, W, 3) uint8."""
        begin = sample_id * 7919 % (self._bytes + 1)  # a prime stride spreads neighbouring ids over the texture
        return self._texture[begin : begin + self._bytes].reshape(self._shape)

    def label(self, sample_id: int) -> int:
        """Returns one of 1000 labels."""
        return sample_id % self._CLASSES

    def labels(self) -> np.ndarray:
        """Returns all labels, (N,) int64."""
        return np.arange(self.num_samples, dtype=np.int64) % self._CLASSES

    def name(self, sample_id: int) -> str:
        """Returns the sample's number."""
        return f"synthetic:{sample_id}"

    def prepare(self, now: np.ndarray, soon: np.ndarray) -> None:
        """Does nothing: there are no files to fetch."""

    def summary(self) -> str:
        """Returns the number of images, for the log."""
        return f"{self.num_samples} synthetic images"

    def problems(self) -> Problems:
        """Returns no problems."""
        return Problems()
