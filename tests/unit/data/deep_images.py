"""Images of any channels and depth, encoded in each format, for the tests that read them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Returns random values over the whole range of integers; normal ones for floats."""
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def tiff(pixels: np.ndarray, layout: str = "contig", **options: Any) -> bytes:
    """Returns (H, W, C) pixels as TIFF: contig (interleaved), separate (planar), or pages (one band on each)."""
    stream, kind = io.BytesIO(), {name: options.pop(name) for name in ("byteorder", "bigtiff") if name in options}
    options = {"photometric": "minisblack", "metadata": None, **options}
    bands = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    with tifffile.TiffWriter(stream, **kind) as writer:
        if layout == "pages" or len(bands) == 1:
            for band in bands:
                writer.write(band, contiguous=False, **options)
        else:
            writer.write(pixels if layout == "contig" else bands, planarconfig=layout, **options)
    return stream.getvalue()


def npy(pixels: np.ndarray) -> bytes:
    """Returns an array as NPY."""
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Returns (H, W, C) pixels of 8 or 16 bits, C from 1 to 4, as PNG."""
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Returns an image as Pillow saves it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def dicom(pixels: np.ndarray, kind: str = "MONOCHROME2", *, bits: int | None = None, **elements: Any) -> bytes:
    """Returns (H, W), or (H, W, 3), pixels as an uncompressed DICOM file; `bits` of a value are used."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else pixels.shape[2]
    dataset.PhotometricInterpretation = kind
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


CELLS, CLASSES = 6, 8


def patchwork(rng: np.random.Generator, label: int, channels: int) -> np.ndarray:
    """Returns uint16 of 6 x 6 cells: something weak that all cells share tells the label, 0 to 7.

    The rest of a cell is strong and drawn for each. It is what an untrained encoder mostly sees, and nothing around a
    cell predicts it. With many bands, (24, 24, C), a cell of 4 x 4 pixels has one spectrum. With one, (48, 48, 1), a
    cell of 8 x 8 pixels has one pattern of 4 x 4 levels. Label and rest have no direction in common.
    """
    size = 16 if channels == 1 else channels
    directions, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((size, size)))
    weights = np.random.default_rng(7).standard_normal((CLASSES, 3))[label] + 0.15 * rng.standard_normal(3)
    cells = directions[:, :3] @ weights + 10 * rng.standard_normal((CELLS, CELLS, size - 3)) @ directions[:, 3:].T
    if channels == 1:
        patterns = np.kron(cells.reshape(CELLS, CELLS, 4, 4), np.ones((2, 2)))
        found = patterns.swapaxes(1, 2).reshape(8 * CELLS, 8 * CELLS, 1)
    else:
        found = np.kron(cells, np.ones((4, 4, 1)))
    found = found + 0.5 * rng.standard_normal(found.shape)
    return np.clip(30_000 + 600 * found, 0, 65535).round().astype(np.uint16)


def patchwork_folders(root: Path, count: int, *, channels: int, seed: int) -> Path:
    """Writes `count` patchworks in folders of their labels: as TIFF, or as 16-bit PNG if they have one channel."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % CLASSES
        pixels = patchwork(rng, label, channels)
        path = root / f"class{label}" / f"{number:05d}.{'png' if channels == 1 else 'tif'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels) if channels == 1 else tiff(pixels, "separate" if number % 3 else "contig"))
    return root
