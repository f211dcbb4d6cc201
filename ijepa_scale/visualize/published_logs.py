"""Reads the CSV logs that were published with the I-JEPA checkpoints, as rows like those of `metrics.jsonl`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ijepa_scale.errors import DataError
from ijepa_scale.regular_file import read_regular

_FIELDS = {"loss": "loss", "mask-A": "context_tokens", "mask-B": "target_tokens", "time (ms)": "step_ms"}
_PLACES = ("epoch", "itr")


def read_published_log(path: Path) -> list[dict[str, Any]]:
    """Returns a row for each iteration, in order: `step` from 0, `epoch` from 1, loss, tokens and step_ms.

    An epoch has as many steps as the highest iteration of the file tells. A log of a run that was resumed repeats its
    header, and may repeat iterations, of which the last counts. A half-written last line is left out.

    Raises:
        DataError: the file has other columns, a line isn't numbers, or it has no rows.

    Source: the logs named in the README of the released code, whose columns are epoch, itr, loss, mask-A, mask-B and
    time (ms).
    """
    try:
        text = read_regular(path).decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}); name a CSV log") from None
    lines = list(csv.reader(io.StringIO(text)))
    header = [name.strip() for name in lines[0]] if lines else []
    if not set(_PLACES) <= set(header) or "loss" not in header:
        raise DataError(
            f"{path} begins with the columns {', '.join(header)[:80] or 'of an empty file'}; a published log has "
            "epoch, itr, loss, mask-A, mask-B, time (ms)"
        )
    found: dict[tuple[int, int], dict[str, float]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if [name.strip() for name in line] == header or not line:
            continue
        try:
            values = dict(zip(header, map(float, line), strict=True))
            place = int(values["epoch"]), int(values["itr"])
        except (ValueError, OverflowError):
            if number == len(lines):
                break
            raise DataError(
                f"{path}, line {number} is {','.join(line)[:60]!r}; expected {len(header)} numbers"
            ) from None
        found[place] = values
    if not found:
        raise DataError(f"{path} has no rows below its header; name a log with at least one iteration")
    steps = 1 + max(iteration for _, iteration in found)
    return [
        {"step": (epoch - 1) * steps + iteration, "epoch": epoch}
        | {ours: found[epoch, iteration][name] for name, ours in _FIELDS.items() if name in found[epoch, iteration]}
        for epoch, iteration in sorted(found)
    ]
