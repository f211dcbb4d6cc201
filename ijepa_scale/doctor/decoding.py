"""Measures how many images a core decodes and crops, and compares that with what a run needs. Reads no file."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ijepa_scale import rng
from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.data import AugmentConfig
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.data.decode import PixelRules
from ijepa_scale.data.parts import Crops
from ijepa_scale.doctor.finding import Finding
from ijepa_scale.errors import SampleError
from ijepa_scale.planning.devices import Cluster, device_with_title
from ijepa_scale.planning.finetune_plan import plan_run
from ijepa_scale.train.setup import encoder_of, pixels_of
from ijepa_scale.tune.loader_workers import HEADROOM

Config = PretrainConfig | FinetuneConfig

SECONDS = 1.5  # of the measurement
_SIZE = (375, 500)  # of an image, as usual in ImageNet


def crops_of(config: Config | None) -> Crops:
    """Returns what cuts the crops of a run; of the published one without a configuration."""
    if config is None:
        return Crops(AugmentConfig(), (224, 224), 0, PixelRules())
    rules = PixelRules(config.data.exif, config.data.decode_scaling, pixels_of(config))
    augment = config.augment if isinstance(config, PretrainConfig) else AugmentConfig()
    return Crops(augment, encoder_of(config).image_size, 0, rules)


def made_image() -> bytes:
    """Returns a JPEG of 500 x 375 pixels with the coarse and fine structure of a photograph; always the same."""
    height, width = _SIZE
    coarse = rng.uniform(0, "doctor", 0, np.arange(24 * 3), 32).reshape(24, 3, 32).transpose(0, 2, 1)
    fine = rng.uniform(0, "doctor", 1, np.arange(height * 3), width).reshape(height, 3, width).transpose(0, 2, 1)
    picture = Image.fromarray((255 * coarse).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(picture) + 24 * (fine - 0.5), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoding_rate(crops: Crops, images: Sequence[bytes], seconds: float) -> float:
    """Returns the crops per second of CPU time that one core cuts from these images, which it decodes again and again.

    Raises:
        SampleError: an image can't be decoded.
    """
    draws = crops.draws(0, np.arange(64))
    begin, count = time.process_time(), 0
    end = time.monotonic() + 4 * seconds  # where others use the cores
    while time.process_time() - begin < seconds and time.monotonic() < end:
        crops.cut(images[count % len(images)], draws[count % len(draws)])
        count += 1
    return count / max(1e-9, time.process_time() - begin)


def needed_rate(config: Config | None, device: torch.device, processes: int, local: int) -> float | None:
    """Returns the images per second that a process needs by the plan; None without a configuration or a known GPU.

    Raises:
        ConfigError: the run is impossible on these GPUs.
    """
    if config is None or device.type != "cuda":
        return None
    kind = device_with_title(torch.cuda.get_device_name(device))
    if kind is None:
        return None
    plan = plan_run(config, Cluster(kind, processes, local))
    return plan.chosen.time.images_per_s / processes


def decoding(
    config: Config | None, images: Sequence[bytes], *, processes: int, needed: float | None, workers: int | None = None
) -> Iterator[Finding]:
    """Yields whether the decoding workers of each of `processes` on this host keep up with `needed` images/s."""
    crops, source = crops_of(config), f"{len(images)} of the run's images"
    if not images:
        images, source = [made_image()], "a made JPEG of 500 x 375"
        if not crops.rules.pixels.is_rgb8:
            yield Finding(check="decoding", found="no image of the data to decode", verdict="not checked")
            return
    try:
        rate = decoding_rate(crops, images, SECONDS)
    except SampleError as error:
        remedy = "set model.channels and data.pixels to what the images have, or fix the data"
        yield Finding(check="decoding", found=str(error), verdict="wrong", remedy=remedy)
        return
    workers = workers if workers is not None else config.data.workers if config is not None else 2
    share = len(os.sched_getaffinity(0)) / processes
    reached = rate * min(max(1, workers), share)
    height, width = crops.image_size
    text = (
        f"{rate:.0f} images/s a core ({source}, crops for {height}x{width}); {workers} workers on {share:g} cores: "
        f"{reached:.0f} images/s a process"
    )
    wrong = needed is not None and reached < HEADROOM * needed
    enough = "" if needed is None else f", {HEADROOM * needed:.0f} needed"
    remedy = ""
    if wrong:
        assert needed is not None
        wanted = int(-(-HEADROOM * needed // rate))
        fits = "" if wanted <= share else f", which takes {wanted} cores a process"
        remedy = f"set data.workers={wanted}{fits}; data.decode_scaling=dct or smaller images decode faster"
    yield Finding(
        check="decoding",
        found=text + (enough or "; what the run needs isn't known here, --need gives it"),
        verdict="wrong" if wrong else "ok" if needed is not None else "not checked",
        remedy=remedy,
        values={
            "images_per_s_per_core": rate,
            "images_per_s_per_process": reached,
            "needed_images_per_s_per_process": needed,
        },
    )


__all__ = ["crops_of", "decoding", "decoding_rate", "made_image", "needed_rate"]
