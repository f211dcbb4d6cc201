"""The documentation as its readers find it: pages, their code, and the commands in it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))])
_FENCE = re.compile(r"^( *)```[^\n]*\n(.*?)^\1```", flags=re.MULTILINE | re.DOTALL)
_SCRIPT = re.compile(r"^launch/(\w+)\.py$")
_VARIABLE = re.compile(r"^[A-Z_]+=")
_STARTERS = ("python", "torchrun", "deepspeed", "srun", "mpirun")


class Command(NamedTuple):
    """A command that starts a script of launch/, as a page shows it."""

    page: str
    script: str  # pretrain
    arguments: list[str]
    before: tuple[str, ...] = ("python",)  # variables and the launcher; ("ijepa",) where it names the script

    def __str__(self) -> str:
        script = self.script if self.before[-1] == "ijepa" else f"launch/{self.script}.py"
        return f"{self.page}: {' '.join(self.before)} {script} {shlex.join(self.arguments)}".rstrip()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks_of(text: str) -> list[str]:
    """Returns the fenced code of a page."""
    return [match[2] for match in _FENCE.finditer(text)]


def prose_of(text: str) -> str:
    """Returns a page without its fenced code."""
    return _FENCE.sub("", text)


def shell_lines_of(path: Path) -> Iterator[list[str]]:
    """Yields the words of each line of a page's fenced code that names no language, and of code in its lines.

    Left out are lines that a shell couldn't read, those with a `...`, which are shown in part only, and in a page's
    prose those that don't begin as a command does.
    """
    text = text_of(path)
    blocks = [block for language, block in _languages_of(text) if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for line in re.findall(r"`([^`\n]+)`", prose_of(text)) if line.startswith(_STARTERS)]
    for line in lines:
        if " ... " not in f"{line} " and "$ deepspeed" not in line:
            with contextlib.suppress(ValueError):  # a quotation mark alone, in what a command prints
                yield shlex.split(line.strip().removeprefix("$ "), comments=True)


def commands_of(path: Path) -> Iterator[Command]:
    """Yields the commands of a page that start a script of launch/, by its path or through `ijepa`."""
    for line in shell_lines_of(path):
        words = line[: line.index(">")] if ">" in line else line
        start = next((number for number, word in enumerate(words) if not _VARIABLE.match(word)), len(words))
        script = next((number for number, word in enumerate(words) if _SCRIPT.match(word)), None)
        if words[start:][:1] == ["ijepa"] and len(words) > start + 1:
            yield Command(path.name, words[start + 1], words[start + 2 :], tuple(words[: start + 1]))
        elif script is not None and words[start].rpartition("/")[2] in _STARTERS:
            yield Command(path.name, words[script][7:-3], words[script + 1 :], tuple(words[:script]))


def _languages_of(text: str) -> Iterator[tuple[str, str]]:
    for match in _FENCE.finditer(text):
        yield match[0].splitlines()[0].strip().removeprefix("```"), match[2]
