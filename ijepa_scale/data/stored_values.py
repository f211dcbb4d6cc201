"""Decodes the formats whose values are taken as they are stored: TIFF, NPY and DICOM. Knows nothing of Pillow's."""

from __future__ import annotations

import numpy as np

from ijepa_scale.config.form import Exif
from ijepa_scale.config.pixels import PixelFormat
from ijepa_scale.data.array_decode import NPY_MAGIC, decode_npy
from ijepa_scale.data.dicom_decode import decode_dicom, is_dicom
from ijepa_scale.data.pixel_format import undecodable
from ijepa_scale.data.tiff_decode import TIFF_MAGIC, decode_tiff
from ijepa_scale.errors import DataError


def decode_stored(data: bytes, wanted: PixelFormat, exif: Exif = "ignore") -> np.ndarray:
    """Returns the values of a TIFF, NPY or DICOM file, (H, W, C) of the format that is wanted.

    Raises:
        SampleError: it is damaged, too large or of another format.
        DataError: a package that reads it isn't installed.
    """
    try:
        if data[:4] in TIFF_MAGIC:
            return decode_tiff(data, wanted, exif)
        return decode_dicom(data, wanted) if is_dicom(data) else decode_npy(data, wanted)
    except DataError:
        raise
    except Exception as error:  # decoders of other projects, on damaged bytes: any error means that one
        raise undecodable(error) from None


def is_stored(data: bytes) -> bool:
    """Returns whether bytes begin like a TIFF, NPY or DICOM file."""
    return data[:4] in TIFF_MAGIC or data.startswith(NPY_MAGIC) or is_dicom(data)


__all__ = ["decode_stored", "is_stored"]
