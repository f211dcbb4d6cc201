"""The format of the images that a run reads: their channels and the type of their values. Knows no file format."""

from __future__ import annotations

from dataclasses import dataclass

from ijepa_scale.config.form import PixelType

MAX_CHANNELS = 16
_BYTES = {"uint8": 1, "uint16": 2, "float32": 4}
_WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}


@dataclass(frozen=True)
class PixelFormat:
    """Channels of an image, and the type of its values."""

    channels: int = 3
    dtype: PixelType = "uint8"

    @property
    def is_rgb8(self) -> bool:
        """Whether images are 8-bit RGB, to which files of many kinds are converted."""
        return self.channels == 3 and self.dtype == "uint8"

    @property
    def white(self) -> float:
        """The value that stands for 1: integers are divided by their largest value, floats are taken as they are."""
        return _WHITE[self.dtype]

    @property
    def value_bytes(self) -> int:
        """Bytes of one value of a pixel."""
        return _BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.dtype}"


RGB8 = PixelFormat()

__all__ = ["MAX_CHANNELS", "RGB8", "PixelFormat"]
