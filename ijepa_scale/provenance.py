"""Collects what a run was made with: package versions, git revision, device. Must not know what is run."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from ijepa_scale import environment, shipped
from ijepa_scale.registry import PLUGINS

_PACKAGES = ("ijepa_scale", "torch", "torchvision", "deepspeed", "numpy", "simplejpeg", "webdataset")


def provenance(*, device: str | None, processes: int) -> dict[str, Any]:
    """Returns versions, git revision, device and plug-ins, for `run.json` and checkpoints.

    `device` is the name of the accelerator; None means the host's processor.
    """
    return {
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        # an installed copy may lie in a virtual environment in somebody else's repository
        "revision": None if shipped.is_installed() else environment.git_revision(str(Path(__file__).parent)),
        "device": device or platform.processor() or "cpu",
        "processes": processes,
        "plugins": list(PLUGINS),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
