"""Looks at some images before a run starts, so that settings that fit none of them are named at once."""

from __future__ import annotations

import typing

from ijepa_scale.config.form import Exif, PixelType
from ijepa_scale.config.pixels import MAX_CHANNELS, PixelFormat
from ijepa_scale.data.deep_decode import decode_as
from ijepa_scale.data.eval_reader import spread
from ijepa_scale.data.pixel_format import FormatError
from ijepa_scale.data.sources.source import SampleSource
from ijepa_scale.errors import DataError, SampleError

_TRIED = 8


def check_first(source: SampleSource, pixels: PixelFormat, exif: Exif, section: str) -> None:
    """Decodes up to eight images, spread over the set. `section` is the one that has `channels`.

    Raises:
        DataError: all have another format, or none can be decoded.
    """
    faults: list[SampleError] = []
    ids = spread(source.num_samples, _TRIED).tolist()
    for sample in ids:
        try:
            decode_as(pixels, source.read(sample), exif)
            return
        except SampleError as error:
            faults.append(error)
    found = {(fault.channels, fault.dtype) if isinstance(fault, FormatError) else None for fault in faults}
    first, (common, *others) = f"the first is {source.name(ids[0])}", found
    if common is not None and not others:
        channels, dtype = common
        types = typing.get_args(PixelType)
        fits = 1 <= channels <= MAX_CHANNELS and dtype in types
        wrong = [f"{section}.channels={channels}"] if channels != pixels.channels else []
        wrong += [f"data.pixels={dtype}"] if dtype != pixels.dtype else []
        remedy = (
            f"set {' '.join(wrong)}, or convert" if fits else f"save 1 to {MAX_CHANNELS} of {', '.join(types)}: convert"
        )
        raise DataError(
            f"all of {len(ids)} images that were tried have {channels} channel{'s' * (channels != 1)} of {dtype}, but "
            f"{section}.channels is {pixels.channels} and data.pixels is {pixels.dtype} ({first}); {remedy} the images"
        )
    raise DataError(
        f"none of {len(ids)} images that were tried can be read with {section}.channels={pixels.channels} and "
        f"data.pixels={pixels.dtype} ({first}: {faults[0]}); set them to what the images have, or fix the data"
    )


__all__ = ["check_first"]
