"""Says what may stand next on the command line of `ijepa`. Must not import torch, nor any command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ijepa_scale import shipped

TABLE = Path(__file__).parent / "known.json"
_SPLIT = re.compile(r"[=:]+")  # a word of its own where bash splits words at these
_RANK = re.compile(r"--local[-_]rank(=\d+)?", re.ASCII)


@dataclass(frozen=True)
class Answer:
    """What may stand in the place of a word: words, each with a text about it, and names of files if `files`.

    Such names stand after the beginning `before` of the word, like `data.train=`.
    """

    words: Mapping[str, str] = field(default_factory=dict)
    files: bool = False
    before: str = ""

    def lines(self, done: str = "") -> list[str]:
        """Returns the answer for a shell that has `done`, the beginning of each word, already.

        The first line says `files` or `words`, and what stands before the names of files.
        """
        before = self.before.removeprefix(done)
        found = [f"{word.removeprefix(done)}\t{about}" for word, about in self.words.items()]
        return ["\t".join(("files" if self.files else "words", before)), *found]


def joined(words: Sequence[str]) -> tuple[list[str], str]:
    """Returns words that bash has split at `=` and `:` as they were, and how much of the last one it left out."""
    whole: list[str] = []
    glue = False
    for word in words:
        split = bool(whole) and _SPLIT.fullmatch(word) is not None
        if split or (glue and word):
            whole[-1] += word
        else:
            whole.append(word)
        glue = split
    last = words[-1] if words else ""
    kept = 0 if glue else len(last)
    return whole, whole[-1][: len(whole[-1]) - kept] if whole else ""


def answer(words: Sequence[str], table: Mapping[str, Any] | None = None) -> Answer:
    """Returns what may stand in the place of the last word, of those after `ijepa`. `table` is that of `known.json`."""
    table = json.loads(TABLE.read_text(encoding="utf-8")) if table is None else table
    *before, current = [word for word in words if not _RANK.fullmatch(word)] or [""]
    commands: Mapping[str, Any] = table["commands"]
    if not before:
        general = {"--help": "list the commands", "--version": "print the version"}
        known = general if current.startswith("-") else {name: each["about"] for name, each in commands.items()}
        return Answer(_beginning(known, current))
    if before[0] not in commands:
        return Answer()
    place = _Place(commands[before[0]])
    for word in before[1:]:
        place.pass_over(word)
    return place.answer(current, table["settings"])


class _Place:
    """A place on a command line: the command, its flags that were given, and the flag whose values stand here."""

    def __init__(self, command: Mapping[str, Any]) -> None:
        self._command = command
        self._given: set[str] = set()
        self._flag: Mapping[str, Any] | None = None
        self._missing = 0  # values that the flag must still have

    def pass_over(self, word: str) -> None:
        """Goes on to the place after a word."""
        if self._missing:
            self._missing -= 1
            if not self._missing and not (self._flag or {}).get("more"):
                self._flag = None
        elif word.startswith("-"):
            name, equals, _ = word.partition("=")
            self._given.add(name)
            self._flag = None if equals else self._command["flags"].get(name)
            self._missing = 0 if self._flag is None else self._flag["values"]
            if self._flag is not None and not self._missing and not self._flag.get("more"):
                self._flag = None
        elif self._flag is None and word in self._command.get("commands", {}):
            self._command = self._command["commands"][word]
            self._given = set()

    def answer(self, current: str, settings: Mapping[str, Any]) -> Answer:
        """Returns what may stand here, where the word begins as `current`."""
        flags: Mapping[str, Any] = self._command["flags"]
        if current.startswith("-") and not self._missing:
            name, equals, value = current.partition("=")
            if equals:
                return _values(flags[name], value, settings, f"{name}=") if name in flags else Answer()
            open_ones = {name: each for name, each in flags.items() if name not in self._given or each.get("again")}
            return Answer(_beginning({name: each["about"] for name, each in open_ones.items()}, current))
        found = [] if self._flag is None else [_values(self._flag, current, settings)]
        if not self._missing:
            found += [_values(each, current, settings) for each in self._command["positional"]]
            about = {name: each["about"] for name, each in self._command.get("commands", {}).items()}
            found.append(Answer(_beginning(about, current)))
        words = {word: text for each in found for word, text in each.words.items()}
        files = next((each for each in found if each.files), Answer())
        if not (words or files.files or current or self._missing):
            words = {name: each["about"] for name, each in flags.items() if name not in self._given}
        return Answer(words, files.files, files.before)


def _values(spec: Mapping[str, Any], current: str, settings: Mapping[str, Any], before: str = "") -> Answer:
    """Returns the values of a flag, a positional argument or a setting, each after the beginning `before`."""
    if "settings" in spec:
        return _of_settings({name: each for kind in spec["settings"] for name, each in settings[kind].items()}, current)
    known = {f"{before}{choice}": "" for choice in (*spec.get("choices", ()), *_shipped(spec.get("shipped", ())))}
    return Answer(_beginning(known, f"{before}{current}"), bool(spec.get("path")), before)


def _of_settings(known: Mapping[str, Any], current: str) -> Answer:
    """Returns the settings that begin so, up to their next dot; after a `=` the values of one."""
    name, equals, value = current.partition("=")
    if equals:
        return _values(known[name], value, {}, f"{name}=") if name in known else Answer()
    found: dict[str, str] = {}
    for each in known:
        if each.startswith(current):
            dot = each.find(".", len(current)) + 1
            found[each[:dot] if dot else f"{each}="] = "section" if dot else known[each]["about"]
    return Answer(found)


def _shipped(patterns: Iterable[str]) -> Iterator[str]:
    """Yields the configurations of the package as a command line may name them."""
    for pattern in patterns:
        folder, _, rest = pattern.partition("/")
        root = shipped.folder(folder)
        yield from sorted(f"{folder}/{path.relative_to(root)}" for path in root.glob(rest))


def _beginning(words: Mapping[str, str], start: str) -> dict[str, str]:
    return {word: about for word, about in words.items() if word.startswith(start)}
