"""Noise images for benchmarks and tests."""

from __future__ import annotations

import numpy as np

from ijepa_scale import rng
from ijepa_scale.config.pixels import RGB8, PixelFormat
from ijepa_scale.data.sources.scan import Problems


class SyntheticSource:
    """Noise images that cost next to nothing: windows of one fixed texture."""

    _SHARD = 1024
    _CLASSES = 1000

    def __init__(
        self, num_samples: int, image_size: tuple[int, int] = (256, 256), seed: int = 0, pixels: PixelFormat = RGB8
    ) -> None:
        self.num_samples = num_samples
        full, rest = divmod(num_samples, self._SHARD)
        self.shard_sizes = np.array([self._SHARD] * full + [rest] * bool(rest), dtype=np.int64)
        self.classes: list[str] | None = None
        kind = "" if pixels.is_rgb8 else f"-{pixels}"
        self.fingerprint = f"synthetic-{num_samples}-{image_size[0]}x{image_size[1]}-{seed}{kind}"
        self._shape = (*image_size, pixels.channels)
        self._values = image_size[0] * image_size[1] * pixels.channels
        texture = np.random.Generator(np.random.Philox(key=rng.key(seed, "synthetic")))
        count = 2 * self._values + 1
        self._texture: np.ndarray = (
            texture.random(count, dtype=np.float32)
            if pixels.dtype == "float32"
            else texture.integers(0, int(pixels.white) + 1, count, dtype=np.dtype(pixels.dtype).type)
        )

    def read(self, sample_id: int) -> np.ndarray:
        """Returns a read-only view of the pixels, (H, W, C)."""
        begin = sample_id * 7919 % (self._values + 1)  # a prime stride spreads neighbouring ids over the texture
        return self._texture[begin : begin + self._values].reshape(self._shape)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns mean and standard deviation of each channel of uniform noise, in units of white."""
        channels = self._shape[-1]
        return (0.5,) * channels, (12**-0.5,) * channels

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
