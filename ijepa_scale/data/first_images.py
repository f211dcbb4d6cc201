"""Looks at some images before a run starts, so that settings that fit none of them are named at once."""

from __future__ import annotations

import typing

import numpy as np

from ijepa_scale.config.form import Exif, PixelType
from ijepa_scale.config.pixels import MAX_CHANNELS, PixelFormat
from ijepa_scale.data.deep_decode import decode_as
from ijepa_scale.data.eval_reader import spread
from ijepa_scale.data.pixel_format import FormatError
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.data.stored_values import decode_stored, is_stored
from ijepa_scale.errors import DataError, SampleError

_TRIED = 8


def check_first(source: SampleSource, pixels: PixelFormat, exif: Exif, section: str) -> None:
    """Decodes up to eight images, spread over the set, until one can be. `section` is the one that has `channels`.

    Raises:
        DataError: all have another format; or none can be decoded, of other formats than 8-bit RGB.
    """
    faults: list[SampleError] = []
    ids = spread(source.num_samples, _TRIED).tolist()
    for sample in ids:
        try:
            _decode(pixels, source.read(sample), exif)
            return
        except SampleError as error:
            faults.append(error)
    found = {(fault.channels, fault.dtype) if isinstance(fault, FormatError) else None for fault in faults}
    first, (common, *others) = f"the first is {source.name(ids[0])}", found
    wanted = f"{section}.channels is {pixels.channels} and data.pixels is {pixels.dtype}"
    if common is not None and not others:
        channels, dtype = common
        raise DataError(
            f"all of {len(ids)} images that were tried have {channels} channel{'s' * (channels != 1)} of {dtype}, but "
            f"{wanted} ({first}); {_remedy(channels, dtype, pixels, section)} the images"
        )
    if not pixels.is_rgb8:  # 8-bit RGB takes files of many kinds; bad ones among them are counted while training
        raise DataError(
            f"none of {len(ids)} images that were tried can be read, and {wanted} ({first}: {faults[0]}); set these to "
            "what the images have, or fix the data"
        )


def _decode(pixels: PixelFormat, data: bytes | np.ndarray, exif: Exif) -> None:
    try:
        decode_as(pixels, data, exif)
    except SampleError:
        if isinstance(data, bytes) and is_stored(data):
            decode_stored(data, pixels)  # says which format it has, where Pillow doesn't know it
        raise


def _remedy(channels: int, dtype: str, pixels: PixelFormat, section: str) -> str:
    types = typing.get_args(PixelType)
    if not 1 <= channels <= MAX_CHANNELS or dtype not in types:
        return f"save 1 to {MAX_CHANNELS} channels of {', '.join(types)}: convert"
    wrong = [f"{section}.channels={channels}"] if channels != pixels.channels else []
    wrong += [f"data.pixels={dtype}"] if dtype != pixels.dtype else []
    return f"set {' '.join(wrong)}, or convert"


__all__ = ["check_first"]
