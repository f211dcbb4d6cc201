"""Decodes DICOM files by pydicom, which is an extra. Knows nothing of crops."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.pixel_format import check_format
from ijepa_scale.errors import DataError, SampleError

_DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax in which everything is compressed; nothing bounds its size


def is_dicom(data: bytes) -> bool:
    """Returns whether bytes begin like a DICOM file."""
    return data[128:132] == b"DICM"


def decode_dicom(data: bytes, wanted: PixelFormat) -> np.ndarray:
    """Returns the first frame of a DICOM file, (H, W, C).

    Integers are the stored values, inverted where the lowest is white (MONOCHROME1). As float32 they are the values
    that the file's rescaling gives, such as Hounsfield units.

    Raises:
        SampleError: it has no pixels, a palette, or is deflated as a whole.
        FormatError: it isn't of the format that is wanted.
        DataError: pydicom isn't installed.
        Exception: what pydicom raises on damaged bytes.
    """
    pydicom = _pydicom()
    if _DEFLATED in data:
        raise SampleError(
            "it is deflated as a whole, so its size can't be bounded; save it uncompressed", "not decodable"
        )
    dataset = pydicom.dcmread(io.BytesIO(data))
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    kind = str(dataset.get("PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        raise SampleError("its pixels have a palette; save its colours", "pixel format")
    signed = bool(dataset.get("PixelRepresentation", 0))
    stored = f"{'int' if signed else 'uint'}{int(dataset.BitsAllocated)}"
    as_float = wanted.dtype == "float32" and stored in ("uint8", "int8", "uint16", "int16", "float32")
    check_format((rows, columns), samples, "float32" if as_float else stored, wanted)
    _check_frame(pydicom, dataset, (columns, rows))
    pixels = pydicom.pixels.pixel_array(dataset, index=0)
    if as_float:
        pixels = pydicom.pixels.apply_rescale(pixels, dataset).astype(np.float32)
    elif kind == "MONOCHROME1":
        pixels = ((1 << int(dataset.BitsStored)) - 1 - pixels.astype(np.int64)).astype(wanted.dtype)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape != (rows, columns, samples) or pixels.dtype != wanted.dtype:
        raise SampleError(
            f"its pixels are {pixels.shape} of {pixels.dtype}, not as its header says; replace it", "not decodable"
        )
    return pixels


def _check_frame(pydicom: Any, dataset: Any, size: tuple[int, int]) -> None:
    """Checks that a compressed frame has the (width, height) of the header, by which memory was judged."""
    if not dataset.file_meta.TransferSyntaxUID.is_compressed:
        return
    frame = pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames", 1) or 1))
    try:
        found = Image.open(io.BytesIO(frame)).size
    except UnidentifiedImageError:  # run lengths, which pydicom decodes to the header's size
        return
    if found != size:
        raise SampleError(f"its frame has {found} pixels and its header says {size}; replace it", "not decodable")


def _pydicom() -> Any:
    try:
        import pydicom.encaps
        import pydicom.pixels
    except ImportError as error:
        raise DataError(f"DICOM needs pydicom ({error}); pip install 'ijepa_scale[dicom]'") from None
    return pydicom


__all__ = ["decode_dicom", "is_dicom"]
