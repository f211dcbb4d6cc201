"""What all processes of a run must have alike: settings, and the images that they read. Knows no kind of training."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ijepa_scale.config.form import Form
from ijepa_scale.config.section import Section, settings
from ijepa_scale.config.yaml_text import flat
from ijepa_scale.engine.agreement import differences
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError
from ijepa_scale.train.task import Task

_OF_A_HOST = ("engine.device",)  # the device that it stands for is compared
_OF_DATA = ("data.train", "evaluate.train", "evaluate.test", "evaluate.data")  # the images in them are compared
_READ_BYTES = 1 << 20  # of a larger file the size is compared


def facts_of(config: Section) -> dict[str, str]:
    """Returns the settings by their dotted names. Of a path, which hosts may have elsewhere, it is what it leads to."""
    values = flat(config.values())
    paths = {name for name, field in settings(type(config), config) if Form(field).is_path}
    facts = {name: repr(value) for name, value in values.items() if name not in paths and name not in _OF_A_HOST}
    for name in paths.difference(_OF_DATA):
        facts[f"what {name} names"] = _named(values.get(name))
    return dict(sorted(facts.items()))


def _named(path: str | None) -> str:
    if path is None or not Path(path).is_file():
        return "nothing" if path is None else "a path"
    size = Path(path).stat().st_size
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if size <= _READ_BYTES else ""
    return f"a file of {size} bytes {digest}".rstrip()


def check_alike(task: Task, world: World) -> None:
    """Checks that all processes read the same images. Communicates.

    Raises:
        ConfigError: they don't; raised on every process.
    """
    own = f"{task.source.summary()} ({task.source.fingerprint[:12]})"
    facts: list[Any] = world.gather_objects({"what is in data.train": own})
    found = differences(facts, world.members) if world.size > 1 else []
    if found:
        raise ConfigError(*found)
