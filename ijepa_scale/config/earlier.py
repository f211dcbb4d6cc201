"""Names that settings had earlier, in files and in what checkpoints store. Mappings in, mappings out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import EncoderConfig
from ijepa_scale.config.section import Section
from ijepa_scale.config.yaml_text import flat, nest

_NAMES: dict[type, dict[str, str]] = {
    FinetuneConfig: {f"model.{name}": f"model.encoder.{name}" for name in EncoderConfig.model_fields}
}


def renamed(content: Mapping[str, Any], kind: type, notes: list[str]) -> dict[str, Any]:
    """Returns the settings under today's names, and adds a note about each that had another."""
    names, found = _NAMES.get(kind, {}), flat(content)
    moved = {key: names[key] for key in found if key in names and names[key] not in found}
    notes += [f"{key} is called {name} now" for key, name in moved.items()]
    return nest({moved.get(key, key): value for key, value in found.items()})


def stored(content: Mapping[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Returns what a checkpoint stores of a configuration, or of some sections, in today's layout.

    A setting that it doesn't know has its default. Keys that are no settings stay as they are.
    """
    settings = {name: value for name, value in content.items() if name in kind.model_fields}
    today = kind(**renamed(settings, kind, [])).values()
    return {name: today.get(name, value) for name, value in content.items()}
