"""What every benchmark needs: who measured, percentiles, rows in a file. Floor 5."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_scale import environment


def about() -> dict[str, Any]:
    """Returns date, revision, device and versions, the beginning of each row."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "revision": environment.git_revision(str(Path(__file__).parent)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {_processor()}",
        "torch": torch.__version__,
    }


def append(path: Path | None, row: dict[str, Any]) -> None:
    """Appends a row to a JSONL file, where one is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({**about(), **row}) + "\n")


def percentiles(values: list[float]) -> dict[str, float]:
    """Returns the 20th, 50th and 80th percentile."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {"p20": float(low), "p50": float(middle), "p80": float(high)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
