"""What all processes of a run must have alike: settings, and the files that they name. Knows no kind of training."""

from __future__ import annotations

import hashlib

from ijepa_scale import shipped
from ijepa_scale.config.form import Form
from ijepa_scale.config.section import Section, settings
from ijepa_scale.config.yaml_text import flat

_OF_A_HOST = (  # no number of a run depends on these, which may fit each host; the device that is chosen is compared
    "engine.device", "engine.start_timeout", "data.workers", "data.prefetch", "data.worker_restarts",
    "data.worker_timeout",
)  # fmt: skip
_OF_DATA = ("data.train", "evaluate.train", "evaluate.test", "health.data")  # compared when opened
_READ_BYTES = 1 << 20  # of a file's beginning and of its end


def facts_of(config: Section) -> dict[str, str]:
    """Returns the settings by their dotted names. Of a path, which hosts may have elsewhere, it is what it leads to.

    Of a configuration that a recipe completes for each host there is nothing to compare: process 0's counts for all.
    """
    if getattr(config, "chosen_by_recipe", ()):
        return {}
    values = flat(config.values())
    paths = {name for name, field in settings(type(config), config) if Form(field).is_path}
    facts = {name: repr(value) for name, value in values.items() if name not in paths and name not in _OF_A_HOST}
    for name in paths.difference(_OF_DATA):
        facts[f"what {name} names"] = _named(values.get(name))
    return dict(sorted(facts.items()))


def _named(path: str | None) -> str:
    """Returns what a path leads to: a file by its size and its first and last MiB, a folder by what is in it."""
    if path is None or "://" in path or path.startswith(("published:", "timm:", "transformers:")):
        return repr(path)
    found = shipped.find(path)
    if found.is_dir():
        return f"a folder with {', '.join(sorted(each.name for each in found.iterdir())[:8])}"
    if not found.is_file():
        return "a path"
    size = found.stat().st_size
    with found.open("rb") as file:
        digest = hashlib.sha256(file.read(_READ_BYTES))
        file.seek(max(file.tell(), size - _READ_BYTES))
        digest.update(file.read(_READ_BYTES))
    return f"a file of {size} bytes ({digest.hexdigest()[:12]})"
