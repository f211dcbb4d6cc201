"""Writes the table that completion answers from, by the parsers of all launch scripts and the schema of settings.

python -m ijepa_scale.completion.known      # in the root of the repository: make docs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ijepa_scale import commands, terminal
from ijepa_scale.completion.answers import TABLE
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.manual import Row, blocks
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.config.section import Section

_KINDS: dict[str, type[Section]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_BOTH = ("plan", "doctor")  # commands that take files of either kind
_FILES = {"pretrain": ("configs/*.yaml",), "finetune": ("configs/finetune/*.yaml",)}
_PATHS = (terminal.path, terminal.existing_path)


class _Parsed(BaseException):
    """Carries the parser of a script to whoever has started the script to get it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def known() -> dict[str, Any]:
    """Returns the table: commands with their flags and arguments, and settings by the kind of run that has them."""
    sections = {kind: sorted({block.title.partition(",")[0] for block in blocks(config)} - {""})
                for kind, config in _KINDS.items()}  # fmt: skip
    found = {}
    for name, script in commands.scripts().items():
        kinds = tuple(_KINDS) if name in _BOTH else (name if name in _KINDS else "pretrain",)
        found[name] = _command(parser_of(script), kinds, sections[kinds[0]], script)
        found[name]["about"] = commands.summary(script)
    for name, each in found["slurm"]["commands"].items():  # what follows its own flags is the command's
        if name in found:
            each["flags"] = {**found[name]["flags"], **each["flags"]}
            each["positional"] = found[name]["positional"]
    return {"commands": found, "settings": {kind: _settings(config) for kind, config in _KINDS.items()}}


def parser_of(script: Path, *arguments: str) -> argparse.ArgumentParser:
    """Returns the parser that a launch script reads these arguments with, without running the script any further."""

    def caught(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Parsed(parser)

    methods = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")
    before = sys.argv, sys.modules["__main__"]
    for method in methods:
        setattr(terminal.Parser, method, caught)
    sys.argv = [f"ijepa {script.stem}", *arguments]
    try:
        commands.run(script)
    except _Parsed as found:
        return found.parser
    finally:
        sys.argv, sys.modules["__main__"] = before
        for method in methods:
            delattr(terminal.Parser, method)
    raise AssertionError(f"{script} has no terminal.Parser")


def _command(
    parser: argparse.ArgumentParser, kinds: Sequence[str], sections: Sequence[str], script: Path
) -> dict[str, Any]:
    """Returns what a parser knows. `kinds` are the kinds of run whose settings it takes."""
    flags: dict[str, Any] = {}
    positional: list[dict[str, Any]] = []
    inside: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {each.dest: each.help or "" for each in action._choices_actions}
            for name, each in action.choices.items():
                if len(each._actions) == 1:  # --help alone: the script reads the rest with another parser
                    each = parser_of(script, name)
                own = (name,) if name in _KINDS else kinds
                inside[name] = {**_command(each, own, sections, script), "about": _plain(about[name])}
        elif action.option_strings and action.help != argparse.SUPPRESS:
            spec = {"about": _plain(action.help or ""), **_flag(action), **_takes(action, kinds, sections)}
            flags.update(dict.fromkeys(action.option_strings, spec))
        elif not action.option_strings:
            positional.append(_takes(action, kinds, sections))
    return {"flags": flags, "positional": positional, **({"commands": inside} if inside else {})}


def _flag(action: argparse.Action) -> dict[str, Any]:
    """Returns how many values a flag has, and whether it may be given again."""
    count = action.nargs
    values = 1 if count is None or count == "+" else count if isinstance(count, int) else 0
    more = {"more": True} if count in ("+", "*", "?") else {}
    again = {"again": True} if isinstance(action, argparse._AppendAction) or action.dest == "plugin" else {}
    return {"values": values, **more, **again}


def _takes(action: argparse.Action, kinds: Sequence[str], sections: Sequence[str]) -> dict[str, Any]:
    """Returns what may stand as a value of a flag or of a positional argument."""
    if action.dest in ("overrides", "set"):
        return {"settings": list(kinds)}
    if action.metavar == "SECTION":
        return {"choices": list(sections)}
    if action.choices:
        return {"choices": [str(choice) for choice in action.choices]}
    config = {"shipped": [pattern for kind in kinds for pattern in _FILES[kind]]} if action.dest == "config" else {}
    return {**({"path": True} if action.type in _PATHS else {}), **config}


def _settings(kind: type[Section]) -> dict[str, Any]:
    """Returns the settings of a kind of run, those of all components among them."""
    return {
        row.setting: {"about": _plain(row.meaning), **_choices(row)} for block in blocks(kind) for row in block.rows
    }


def _choices(row: Row) -> dict[str, Any]:
    """Returns the values that a setting may have, as far as they can be listed."""
    if row.setting == "engine.ds_config":
        return {"path": True, "shipped": ["ds_configs/*.json"]}
    if row.unit == "path":
        return {"path": True}
    takes = row.takes.removesuffix(" or null")
    if not takes.startswith("one of ") and not takes.endswith("true or false"):
        return {}
    null = ["null"] if takes != row.takes else []
    return {"choices": [*re.split(", | or ", takes.removeprefix("one of ")), *null]}


def _plain(text: str) -> str:
    """Returns a help text in one line, without what differs between machines."""
    return re.sub(r"[;,]? ?\((default|default:)[^()]*\)", "", " ".join(text.replace("%%", "%").split())).strip()


def text() -> str:
    """Returns the content of the table's file."""
    return json.dumps(known(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
