"""Collects what a run was made with: package versions, git revision, device. Must not know what is run."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import sys
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


def code_facts() -> dict[str, str]:
    """Returns what all processes of a run must have alike of the code: versions, and digests of the package's files.

    Plug-ins count as files of the package. Reads them all, about 400.
    """
    package = Path(__file__).parent
    facts = {f"the version of {name}": str(_version(name)) for name in _PACKAGES}
    facts["the version of Python"] = platform.python_version()
    for folder in (package, *_folders_of("ijepa_kernels")):
        for path in sorted(folder.rglob("[!.]*.py")):
            facts[f"the file {path.relative_to(folder.parent)}"] = _digest(path)
    for name in PLUGINS:
        origin = getattr(sys.modules.get(name), "__file__", None)
        facts[f"the plug-in {name}"] = _digest(Path(origin)) if origin and Path(origin).is_file() else "not a file"
    return facts


def _folders_of(package: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    return [Path(found.origin).parent] if found is not None and found.origin else []


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
