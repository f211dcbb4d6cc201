"""Runs the Triton kernel under the interpreter (TRITON_INTERPRET=1) and prints how far it is from the reference."""

from __future__ import annotations

import json

import numpy as np
import torch

from ijepa_kernels.crop_resize import crop_resize
from tests.unit.kernels.test_crop_resize import some_crops

CASES = {
    "shrunk": ([(37, 53), (53, 37), (60, 60)], (28, 28)),
    "one pixel": ([(1, 1), (1, 50), (50, 1), (2, 3)], (16, 9)),
    "enlarged": ([(3, 4), (10, 9)], (40, 33)),
    "several tiles": ([(70, 90), (35, 32)], (33, 70)),
    "much shrunk": ([(61, 90)], (5, 4)),
    "no crop": ([], (8, 8)),
}
SCALE, SHIFT = (0.017, 0.018, 0.019), (-2.1, -2.0, -1.8)


def main() -> None:
    found = {}
    for name, (sizes, output) in CASES.items():
        if sizes:
            pixels, sizes, _ = some_crops(sizes)
        else:
            pixels, sizes = torch.zeros(0, dtype=torch.uint8), np.zeros((0, 2), dtype=int)
        flip = np.arange(len(sizes)) % 2 == 0
        for interpolation in ("bilinear", "bicubic"):
            options = {"interpolation": interpolation, "flip": flip}
            expected = crop_resize(pixels, sizes, output, implementation="reference", **options)
            levels = crop_resize(pixels, sizes, output, implementation="triton", **options)
            assert levels.shape == expected.shape == (len(sizes), 3, *output)
            off = (levels.int() - expected.int()).abs()
            options |= {"normalise": (SCALE, SHIFT), "dtype": torch.float32}
            normalised = crop_resize(pixels, sizes, output, implementation="triton", **options)
            scaled = levels.float() * torch.tensor(SCALE)[:, None, None] + torch.tensor(SHIFT)[:, None, None]
            found[f"{name}, {interpolation}"] = {
                "levels": off.max().item() if off.numel() else 0,
                "share": (off > 0).float().mean().item() if off.numel() else 0.0,
                "normalised": (normalised - scaled).abs().max().item() if off.numel() else 0.0,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
