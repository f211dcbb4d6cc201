"""Names that settings had earlier, in files and in what checkpoints store.

Mappings in, mappings out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.schema import EncoderConfig
from ijepa_scale.config.section import Section, nested
from ijepa_scale.config.yaml_text import flat, nest

_NAMES: dict[type, dict[str, str]] = {
    FinetuneConfig: {
        **{f"model.{name}": f"model.encoder.{name}" for name in EncoderConfig.model_fields},
        "optimizer.epochs": "schedule.epochs",
        "optimizer.warmup_epochs": "schedule.warmup_epochs",
        "stop_after": "schedule.stop_after",
        "evaluate.data": "evaluate.test",
    }
}


def renamed(content: Mapping[str, Any], kind: type, notes: list[str]) -> dict[str, Any]:
    """Returns the settings under today's names, and adds a note about each that had an earlier one."""
    names, found = _NAMES.get(kind, {}), flat(content)
    moved = {key: names[key] for key in found if key in names and names[key] not in found}
    notes += [f"{key} is called {name} now" for key, name in moved.items()]
    today = {moved.get(key, key): value for key, value in found.items()}
    sections = {name[:end] for name in moved.values() for end, letter in enumerate(name) if letter == "."}
    # an empty section must not take the place of what is in it now, nor these hide a section that is none
    others = {key: value for key, value in today.items() if key not in sections}
    return nest(others | {key: today[key] for key in today if key in sections and today[key] not in ({}, None)})


def stored(
    content: Mapping[str, Any], kind: type[Section], *, sections: Collection[str] | None = None
) -> dict[str, Any]:
    """Returns what a checkpoint stores of a configuration: under today's names, these sections in today's layout.

    `sections` None are all. In them, a setting that the checkpoint doesn't know has its default. Other keys keep their
    values: they are not read as settings, so a component that they name need not be there.
    """
    known = {*kind.model_fields, *(name.split(".")[0] for name in _NAMES.get(kind, {}))}
    ours = {name: content[name] for name in content if name in known and not _is_other(content[name], name, kind)}
    today = renamed(ours, kind, [])
    chosen = {name: today[name] for name in today if sections is None or name in sections}
    whole = kind(**chosen).values()
    others = {name: value for name, value in content.items() if name not in ours}
    return {**others, **today, **{name: whole[name] for name in chosen}}


def _is_other(value: Any, name: str, kind: type[Section]) -> bool:
    """Returns whether a value that has the name of a section is none."""
    return name in kind.model_fields and nested(kind.model_fields[name])[0] is not None and not isinstance(value, dict)
