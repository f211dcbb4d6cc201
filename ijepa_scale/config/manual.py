"""The reference of all settings, generated from the schema: Markdown, text for a terminal, JSON Schemas for editors.

python -m ijepa_scale.config.manual      # in the root of the repository: make docs
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.form import Form
from ijepa_scale.config.nearest import nearest
from ijepa_scale.config.schema import PretrainConfig, SinkConfig
from ijepa_scale.config.section import Section, nested
from ijepa_scale.config.yaml_text import write_yaml
from ijepa_scale.errors import ConfigError

_KINDS: dict[str, type[Section]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_INTRODUCTION = """# Settings

Written by `make docs` from the schema, `ijepa_scale/config/`. A file holds what differs from the defaults, or from the
file that its `base` names; `section.key=value` on the command line goes before both. `--print-config` prints what a run
takes, `--help-config masks` this page's part on a section. The first line of each file in `configs/` names its JSON
Schema, so that an editor completes and checks it.
"""


class Row(NamedTuple):
    """A setting."""

    setting: str
    takes: str
    default: str
    bounds: str
    unit: str
    meaning: str


class Block(NamedTuple):
    """A section, or what a choice adds to it."""

    title: str
    text: str
    rows: list[Row]


def blocks(kind: type[Section], defaults: Section | None = None, at: str = "") -> Iterator[Block]:
    """Yields the sections of a configuration class, choices among them included, in order."""
    defaults = defaults or kind()
    inside = {name: declared for name, field in kind.model_fields.items() if (declared := nested(field)[0])}
    plain = {name: field for name, field in kind.model_fields.items() if name not in inside or nested(field)[1]}
    yield Block(
        at,
        _text(kind),
        [_row(f"{at}.{name}".strip("."), each, getattr(defaults, name)) for name, each in plain.items()],
    )
    for member, names in _members(kind).items():
        own = {name: field for name, field in member.model_fields.items() if name not in kind.model_fields}
        rows = [_row(f"{at}.{name}", field, field.get_default()) for name, field in own.items()]
        if rows and kind.selector:
            yield Block(f"{at}, {kind.selector} {' or '.join(names)}", _text(member), rows)
    for name, declared in inside.items():
        if nested(kind.model_fields[name])[1]:
            for each in declared.names():
                yield from blocks(declared.member(each), None, f"{at}.{name}.{each}")
        else:
            yield from blocks(declared, getattr(defaults, name), f"{at}.{name}".strip("."))


def _members(kind: type[Section]) -> dict[type[Section], list[str]]:
    """Returns the sections that may stand for this one, each with the names that choose it."""
    found: dict[type[Section], list[str]] = {}
    for name in kind.names():
        found.setdefault(kind.member(name), []).append(name)
    return found


def _text(kind: type[Section]) -> str:
    return " ".join((kind.__doc__ or "").split())


def _row(setting: str, field: FieldInfo, default: Any) -> Row:
    form = Form(field)
    shown = write_yaml(list(default) if isinstance(default, tuple) else default).removesuffix("...\n").strip()
    return Row(setting, form.words + " or null" * form.nullable, shown, form.bounds, form.unit, field.description or "")


def help_text(kind: type[Section], section: str | None = None) -> str:
    """Returns the settings of a section, or of all, for a terminal of 80 columns.

    Raises:
        ConfigError: there is no such section.
    """
    found = list(blocks(kind))
    names = [block.title for block in found if block.title and "," not in block.title]
    if section and section not in names:
        near = nearest(section, names)
        raise ConfigError(
            f"--help-config {section}: no such section; "
            + (f"did you mean {near}?" if near else f"there are {', '.join(names)}")
        )
    lines = []
    for block in found:
        if section and not f"{block.title.replace(',', '.')}.".startswith(f"{section}."):
            continue
        lines += ["", *textwrap.wrap(f"{block.title}: {block.text}" if block.title else block.text, 80)]
        for row in block.rows:
            facts = filter(None, (row.takes, row.bounds, row.unit, f"default {row.default}"))
            lines += textwrap.wrap(
                f"{row.setting}  ({', '.join(facts)})", 80, initial_indent="  ", subsequent_indent="      "
            )
            lines += textwrap.wrap(row.meaning, 80, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines[1:])


def markdown() -> str:
    """Returns docs/configuration.md."""
    lines, known = [_INTRODUCTION], set()
    for title, kind in (("Pretraining", PretrainConfig), ("Finetuning", FinetuneConfig)):
        lines += [
            f"## {title}",
            "",
            f"`launch/{title.lower().removesuffix('ing').replace('pretrain', 'pretrain')}.py`.",
            "",
        ]
        for block in blocks(kind):
            lines += [f"### {block.title or 'Top level'}", "", block.text, ""]
            if (block.title, *block.rows) in known:
                lines[-2:] = ["As in pretraining.", ""]
                continue
            known.add((block.title, *block.rows))
            lines += ["| setting | takes | default | bounds | unit | meaning |", "|---|---|---|---|---|---|"]
            lines += [
                f"| `{row.setting}` | {row.takes} | `{row.default}` | {' | '.join(row[3:])} |" for row in block.rows
            ]
            lines.append("")
    return "\n".join(lines)


def json_schema(kind: type[Section]) -> dict[str, Any]:
    """Returns the JSON Schema of a configuration file."""
    selectable = {
        name: declared
        for name, field in kind.model_fields.items()
        if (declared := nested(field)[0]) and declared.selector
    }
    members = {declared: _members(declared) for declared in selectable.values()}
    classes = [kind, *(member for each in members.values() for member in each)]
    _, schema = models_json_schema([(each, "validation") for each in dict.fromkeys(classes)])
    definitions = _without_titles(schema["$defs"])
    definitions[SinkConfig.__name__] = {"type": "object"}  # each sink has its own
    root = definitions.pop(kind.__name__)
    root["properties"]["base"] = {"type": "string", "description": "File that this one is laid over, relative to it."}
    for each in root["properties"].values():
        if "$ref" in each:
            each.pop("default", None)
    for name, declared in selectable.items():
        for member, names in members[declared].items():
            definitions[member.__name__]["properties"][declared.selector]["enum"] = names
        other = {
            "required": [declared.selector],
            "properties": {declared.selector: {"not": {"enum": list(declared.names())}}},
        }
        known = [{"$ref": f"#/$defs/{member.__name__}"} for member in members[declared]]
        root["properties"][name] = {"anyOf": [*known, other]}  # other: a plugin's
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _without_titles(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_titles(value) for key, value in schema.items() if key != "title"}
    return [_without_titles(each) for each in schema] if isinstance(schema, list) else schema


def generated() -> dict[str, str]:
    """Returns the text of each generated file."""
    schemas = {
        f"configs/schema/{name}.json": json.dumps(json_schema(kind), indent=1) + "\n" for name, kind in _KINDS.items()
    }
    return {"docs/configuration.md": markdown(), **schemas}


if __name__ == "__main__":
    for path, text in generated().items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
