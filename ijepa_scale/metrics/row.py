"""The fields of a row of `metrics.jsonl`, with their units."""

from __future__ import annotations

from collections.abc import Mapping

from ijepa_scale.metrics.meters import STEP
from ijepa_scale.schedules import Hyper

Row = dict[str, float | int | None]

FIELDS = (
    "step",  # optimiser steps done
    "epoch",
    "images_seen",  # by all processes, including this step
    "loss",  # mean since the last row, over all processes
    "grad_norm",  # before clipping
    "lr",
    "weight_decay",
    "momentum",
    "data_wait_ms",  # per step, in next() of the loader
    "step_ms",  # per step, wall time without evaluation, checkpoints and the first step of a process
    "images_per_s",  # summed over all processes
    "mfu",  # share of all devices' peak; null if the peak is unknown
    "peak_bytes",  # peak device memory; null on the CPU
    "target_std",  # `feature_std`: 0 is collapse
    "context_tokens",  # per image
    "target_tokens",  # per target block
    "slowest_process",  # the one with the longest own time: from asking for data until it may wait for others
    "slowest_own_ms",  # that time, per step; this and the next are null where one process trains
    "slowest_data_wait_ms",  # its part that was spent in next() of the loader
    "median_own_ms",  # of all processes
)  # and, where steps were left out, `steps_skipped`: how many so far


def training_row(
    means: Mapping[str, float],
    *,
    step: int,
    epoch: int,
    images_seen: int,
    hyper: Hyper,
    images_per_step: int,
    flops_per_image: float | None = None,
    peak_flops: float | None = None,
) -> Row:
    """Returns a row with all `FIELDS` from the result of `Meters.flush`; a field that wasn't measured is None.

    `images_per_step` is summed over all processes. `flops_per_image` covers forward and backward of one training
    image, and `peak_flops` is the sum of all devices' peaks in FLOP/s. Extra means go to the end of the row.
    """
    step_s = means.get(STEP, 0.0) / 1e3  # missing if the warm-up was the only step
    images_per_s = images_per_step / step_s if step_s > 0 else None
    known = {
        "step": step,
        "epoch": epoch,
        "images_seen": images_seen,
        "lr": hyper.lr,
        "weight_decay": hyper.weight_decay,
        "momentum": hyper.momentum,
        "images_per_s": images_per_s,
        "mfu": None,
    }
    if images_per_s is not None and flops_per_image is not None and peak_flops is not None:
        known["mfu"] = images_per_s * flops_per_image / peak_flops
    row: Row = {name: known[name] if name in known else means.get(name) for name in FIELDS}
    return row | {name: value for name, value in means.items() if name not in row}
