"""Runs the Triton kernel for any channels in the interpreter; prints how far it is from the reference and from float64.

Distances are in units of white.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from ijepa_kernels.crop_resize import crop_resize
from ijepa_kernels.crop_resize.triton_channels import ChannelKernel
from tests.unit.data.deep_images import values
from tests.unit.kernels.test_crop_resize_channels import WHITE, expected

CASES = {"shrunk, bilinear": ([(37, 53), (20, 9)], (14, 18)), "enlarged, bicubic": ([(3, 4), (1, 1)], (33, 20))}
KINDS = (("uint8", 1), ("uint8", 4), ("uint16", 2), ("float32", 3))


def main() -> None:
    found = {}
    for dtype, channels in KINDS:
        for name, (sizes, output) in CASES.items():
            crops = [values((*size, channels), dtype, number) for number, size in enumerate(sizes)]
            pixels = torch.from_numpy(np.concatenate([crop.reshape(-1) for crop in crops]))
            flip, interpolation = np.array([True, False]), name.rpartition(" ")[2]
            options = {"interpolation": interpolation, "flip": flip}
            reference = crop_resize(
                pixels, np.array(sizes), output, implementation="reference", channels=channels, **options
            )
            factors = tuple(2.0**channel for channel in range(channels)), tuple(range(channels))
            scaled = ChannelKernel(channels, pixels.dtype).crop_resize(
                pixels, np.array(sizes), output, normalise=factors, dtype=torch.float32, **options
            )
            scale, shift = (torch.tensor(each)[:, None, None] for each in factors)
            plain = (scaled.double() - shift) / scale
            by_float = np.stack(
                [expected(crop, output, interpolation, bool(one)) for crop, one in zip(crops, flip, strict=True)]
            )
            off = np.abs(plain.permute(0, 2, 3, 1).numpy() - by_float) / WHITE[dtype]
            found[f"{dtype}, {channels}, {name}"] = {
                "of reference": (plain - reference.double()).abs().max().item() / WHITE[dtype],
                "of float": float(off.mean() if dtype == "uint8" else off.max()),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
