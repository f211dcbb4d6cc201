"""Names that settings had earlier, or have in the other kind of run, in files and in what checkpoints store.

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
    FinetuneConfig: {f"model.{name}": f"model.encoder.{name}" for name in EncoderConfig.model_fields}
}

# Of settings that pretraining has too: its names for them are read as well, without a note.
_ALSO: dict[type, dict[str, str]] = {
    FinetuneConfig: {
        "schedule.epochs": "optimizer.epochs",
        "schedule.warmup_epochs": "optimizer.warmup_epochs",
        "schedule.stop_after": "stop_after",
        "evaluate.test": "evaluate.data",
    }
}


def renamed(content: Mapping[str, Any], kind: type, notes: list[str]) -> dict[str, Any]:
    """Returns the settings under today's names, and adds a note about each that had an earlier one."""
    earlier, also, found = _NAMES.get(kind, {}), _ALSO.get(kind, {}), flat(content)
    names = earlier | also
    moved = {key: names[key] for key in found if key in names and names[key] not in found}
    notes += [f"{key} is called {name} now" for key, name in moved.items() if key in earlier]
    return nest({moved.get(key, key): value for key, value in found.items()})


def stored(
    content: Mapping[str, Any], kind: type[Section], *, sections: Collection[str] | None = None
) -> dict[str, Any]:
    """Returns what a checkpoint stores of a configuration, with these of its sections (None: all) in today's layout.

    A setting that it doesn't know has its default. Other keys stay as they are: they are not read as settings, so a
    component that they name need not be there.
    """
    fields = {
        name: field for name, field in kind.model_fields.items() if name in content and name in (sections or content)
    }
    ours = {
        name: content[name] for name, field in fields.items() if not nested(field)[0] or isinstance(content[name], dict)
    }
    today = kind(**renamed(ours, kind, [])).values()
    return {name: today[name] if name in ours else value for name, value in content.items()}
