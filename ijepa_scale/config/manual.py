"""The reference of all settings, generated from the schema: Markdown, text for a terminal, JSON Schemas for editors.

python -m ijepa_scale.config.manual      # in the root of the repository: make docs
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.json_schema import models_json_schema

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.form import Form
from ijepa_scale.config.schema import PretrainConfig, SinkConfig
from ijepa_scale.config.section import Section, nested
from ijepa_scale.errors import ConfigError
from ijepa_scale.nearest import nearest

_INTRODUCTION = """# Settings

`make docs` writes this page from the schema in `ijepa_scale/config/`. A file holds only what differs from the defaults,
or from the file that its `base` names. `section.key=value` on the command line overrides both. `--print-config` prints
the settings that a run would use, and `--help-config masks` prints this page's part on a section. The first line of
each file in `configs/` names its JSON Schema, so that editors can complete and check it.

Files are YAML 1.2: `0012` is 12, `1e-3` is a number, `1_000`, `1:30`, `on` and `yes` are text. Settings that take text
keep it as written: `folder: 0012` is the folder 0012, and `data.train=/data/run #2` on the command line is that
path.

In settings of unit "path", and in all paths on the command lines of `launch/`, a leading `~` or `~user` and each
`$NAME` or `${NAME}` are replaced by the home folder and the value of the environment variable. A variable that isn't
set is refused. Write `./~` for a folder of that name, and `$$` for a `$` before a name: `rates/$$USD` is the folder
`$USD` in `rates`. If an image file has exactly the name given to `launch/predict.py`, that file is used. Addresses such
as `https://` and `pipe:` are left unchanged. The `{{ }}` of templates are refused.
"""
_HEAD = ["| setting | takes | default | bounds | unit | meaning |", "|---|---|---|---|---|---|"]


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
    rows: tuple[Row, ...]


def blocks(kind: type[Section], defaults: Section | None = None, at: str = "") -> Iterator[Block]:
    """Yields the sections of a configuration class, choices among them included."""
    defaults, prefix = defaults or kind(), f"{at}." if at else ""
    inside = {name: nested(field) for name, field in kind.model_fields.items() if nested(field)[0]}
    leaves = [name for name in kind.model_fields if not inside.get(name, (None, True))[0] or inside[name][1]]
    yield Block(at, _text(kind), tuple(_row(kind, name, prefix, getattr(defaults, name)) for name in leaves))
    for member, names in _members(kind).items() if kind.selector else ():
        own = [name for name in member.model_fields if name not in kind.model_fields]
        rows = tuple(_row(member, name, prefix, member.model_fields[name].get_default()) for name in own)
        if rows:
            yield Block(f"{at}, {kind.selector} {' or '.join(names)}", _text(member), rows)
    for name, (declared, many) in inside.items():
        assert declared is not None
        if many:
            for each in declared.names():
                yield from blocks(declared.member(each), None, f"{prefix}{name}.{each}")
        else:
            yield from blocks(declared, getattr(defaults, name), f"{prefix}{name}")


def _members(kind: type[Section]) -> dict[type[Section], list[str]]:
    """Returns the sections that may stand for this one, each with the names that choose it."""
    found: dict[type[Section], list[str]] = {}
    for name in kind.names():
        found.setdefault(kind.member(name), []).append(name)
    return found


def _text(kind: type[Section]) -> str:
    return " ".join((kind.__doc__ or "").split())


def _row(kind: type[Section], name: str, prefix: str, default: Any) -> Row:
    field, form = kind.model_fields[name], Form(kind.model_fields[name])
    takes = (
        f"one of {', '.join(kind.names())}" if name == kind.selector else f"{form.words}{' or null' * form.nullable}"
    )
    return Row(f"{prefix}{name}", takes, _shown(default), form.bounds, form.unit, field.description or "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def help_text(kind: type[Section], section: str = "") -> str:
    """Returns the settings of a section, or of all, for a terminal of 80 columns.

    Raises:
        ConfigError: there is no such section.
    """
    found = {block: block.title.partition(",")[0] for block in blocks(kind)}
    if section and section not in found.values():
        near = nearest(section, {*found.values()} - {""})
        there = (
            f"did you mean {near}?" if near else f"there are {', '.join(dict.fromkeys(filter(None, found.values())))}"
        )
        raise ConfigError(f"--help-config {section}: no such section; {there}")
    lines: list[str] = []
    for block in (block for block, name in found.items() if not section or f"{name}.".startswith(f"{section}.")):
        lines += ["", *textwrap.wrap(": ".join(filter(None, (block.title, block.text))), 80)]
        for row in block.rows:
            facts = ", ".join(filter(None, (row.takes, row.bounds, row.unit, f"default {row.default}")))
            lines += textwrap.wrap(f"{row.setting}  ({facts})", 80, initial_indent="  ", subsequent_indent=" " * 6)
            lines += textwrap.wrap(row.meaning, 80, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def markdown() -> str:
    """Returns docs/configuration.md."""
    lines, known = [_INTRODUCTION], set()
    for title, script, kind in (
        ("Pretraining", "pretrain", PretrainConfig),
        ("Finetuning", "finetune", FinetuneConfig),
    ):
        lines += [f"## {title}", "", f"For `launch/{script}.py`.", ""]
        for block in blocks(kind):
            lines += [f"### {title}: {block.title or 'the run'}", ""]
            if block in known:
                lines += ["As in pretraining.", ""]
                continue
            known.add(block)
            lines += [block.text, "", *_HEAD]
            lines += [
                f"| `{row.setting}` | {row.takes} | `{row.default}` | {' | '.join(row[3:])} |" for row in block.rows
            ]
            lines.append("")
    return "\n".join(lines)


def json_schema(kind: type[Section]) -> dict[str, Any]:
    """Returns the JSON Schema of a configuration file."""
    inside = {name: nested(field)[0] for name, field in kind.model_fields.items()}
    selectable = {name: (each, _members(each)) for name, each in inside.items() if each and each.selector}
    classes = dict.fromkeys([kind, *(member for _, members in selectable.values() for member in members)])
    definitions = _untitled(models_json_schema([(each, "validation") for each in classes])[1]["$defs"])
    definitions[SinkConfig.__name__] = {"type": "object"}  # each sink has its own
    root = definitions.pop(kind.__name__)
    root["properties"]["base"] = {"type": "string", "description": "File that this one is laid over, relative to it."}
    for name, (declared, members) in selectable.items():
        for member, names in members.items():
            definitions[member.__name__]["properties"][declared.selector]["enum"] = names
        plugged = {declared.selector: {"not": {"enum": list(declared.names())}}}
        known = [{"$ref": f"#/$defs/{member.__name__}"} for member in members]
        root["properties"][name] = {"anyOf": [*known, {"required": [declared.selector], "properties": plugged}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _untitled(schema: Any) -> Any:
    """Returns a schema without titles, which repeat names, and without the defaults of whole sections."""
    if isinstance(schema, dict):
        kept = {key: value for key, value in schema.items() if key != "title"}
        return {key: _untitled(value) for key, value in kept.items() if not (key == "default" and "$ref" in schema)}
    return [_untitled(each) for each in schema] if isinstance(schema, list) else schema


def generated() -> dict[str, str]:
    """Returns the text of each generated file."""
    kinds: dict[str, type[Section]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    schemas = {f"configs/schema/{name}.json": json.dumps(json_schema(kind), indent=1) for name, kind in kinds.items()}
    return {"docs/configuration.md": markdown(), **{path: f"{text}\n" for path, text in schemas.items()}}


if __name__ == "__main__":
    for path, text in generated().items():
        Path(path).write_text(text, encoding="utf-8")
