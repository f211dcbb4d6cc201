"""Checks of an image's size and format before memory is allocated for its pixels. Knows no file format."""

from __future__ import annotations

from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.pil_decode import check_pixels
from ijepa_scale.errors import SampleError

MAX_BYTES = 1 << 29  # of one decoded image, 512 MiB: 20 million pixels of 13 channels of 16 bits


class FormatError(SampleError):
    """An image of another format than the run reads, with its own channels and numpy type."""

    def __init__(self, channels: int, dtype: str, wanted: PixelFormat) -> None:
        super().__init__(
            f"its pixels have {channels} channel{'s' * (channels != 1)} of {dtype}, but model.channels is "
            f"{wanted.channels} and data.pixels is {wanted.dtype}; convert, replace or drop it, or set these to "
            "what the images have",
            "pixel format",
        )
        self.channels, self.dtype = channels, dtype


def check_format(size: tuple[int, int], channels: int, dtype: str, wanted: PixelFormat) -> None:
    """Checks an image by its header: `size` is height and width, `dtype` the numpy type of its values.

    Raises:
        SampleError: it has no pixels, over `MAX_PIXELS`, or takes over `MAX_BYTES` decoded.
        FormatError: it isn't of the format that is wanted.
    """
    check_pixels(*size)
    if (channels, dtype) != (wanted.channels, wanted.dtype):
        raise FormatError(channels, dtype, wanted)
    decoded = size[0] * size[1] * channels * wanted.value_bytes
    if decoded > MAX_BYTES:
        raise SampleError(
            f"image of {size[1]} x {size[0]} pixels with {wanted}: {decoded} bytes decoded; give up to {MAX_BYTES}, "
            "or cut it into tiles",
            "too many pixels",
        )


def undecodable(error: Exception) -> SampleError:
    """Returns what a decoder's error means for the sample."""
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return SampleError(f"not a decodable image ({type(error).__name__}: {said}); replace or drop it", "not decodable")


__all__ = ["MAX_BYTES", "FormatError", "check_format", "undecodable"]
