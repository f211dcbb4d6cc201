"""How far are crops that `data.decode_scaling=dct` reads from exact ones, and what does it save?

Each photograph is cropped as in pretraining, several times, and each crop is read exactly and at reduced scale. Levels
are those of crops that differ: crops under twice the output are the same bytes.

    python -m benchmarks.decode_scaling --images FOLDER --sizes 64,96,160
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from ijepa_scale import rng
from ijepa_scale.config.data import AugmentConfig
from ijepa_scale.data.decode import CROP_DRAWS, PixelRules, decode_crop
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.source import SampleSource

CONFIG = AugmentConfig()
CROPS = 4  # of each photograph
RULES = {"none": PixelRules(), "dct": PixelRules(decode_scaling="dct")}


def compare(source: SampleSource, side: int, count: int) -> dict[str, float]:
    """Returns levels of 255 and CPU-microseconds over `CROPS` crops of `count` photographs, at side x side pixels."""
    deviations, largest, spent = [], 0.0, dict.fromkeys(RULES, 0.0)
    for sample in range(count):
        data = source.read(sample)
        for draws in rng.uniform(0, "crop", sample, np.arange(CROPS), CROP_DRAWS).tolist():
            images = {}
            for name, rules in RULES.items():
                begun = time.process_time()
                crop = decode_crop(
                    data, draws, (side, side), scale=CONFIG.crop_scale, ratio=CONFIG.crop_ratio, rules=rules
                )
                spent[name] += time.process_time() - begun
                images[name] = crop
            if not np.array_equal(images["none"], images["dct"]):  # both were resized to side x side
                apart = np.abs(images["none"].astype(int) - images["dct"])
                deviations.append(float(apart.mean()))
                largest = max(largest, float(apart.max()))
    low, middle, high = np.quantile(deviations, (0.1, 0.5, 0.9)) if deviations else (0.0, 0.0, 0.0)
    return {
        "size": side,
        "crops": CROPS * count,
        "scaled": len(deviations) / (CROPS * count),
        "mean": float(np.mean(deviations or [0.0])),
        "p10": float(low), "p50": float(middle), "p90": float(high), "max": largest,
        **{f"{name}_us": 1e6 * seconds / (CROPS * count) for name, seconds in spent.items()},
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Prints a row of JSON for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--sizes", default="64,96,160", help="sides of the output, pixels")
    parser.add_argument("--count", type=int, default=10_000, help="photographs at most")
    options = parser.parse_args(arguments)
    source = ImageFolderSource(options.images)
    for side in map(int, options.sizes.split(",")):
        row = compare(source, side, min(options.count, source.num_samples))
        print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
