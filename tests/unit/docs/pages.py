"""The documentation as its readers find it: pages, their code, and the commands in it."""

from __future__ import annotations

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
_STARTERS = ("python", "torchrun", "deepspeed", "srun", "mpirun")


class Command(NamedTuple):
    """A command that starts a script of launch/, as a page shows it."""

    page: str
    script: str  # pretrain
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.page}: launch/{self.script}.py {shlex.join(self.arguments)}"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks_of(text: str) -> list[str]:
    """Returns the fenced code of a page."""
    return [match[2] for match in _FENCE.finditer(text)]


def prose_of(text: str) -> str:
    """Returns a page without its fenced code."""
    return _FENCE.sub("", text)


def commands_of(path: Path) -> Iterator[Command]:
    """Yields the commands in a page's fenced code and in its lines. Those with a `...` are shown in part only."""
    text = text_of(path)
    lines = [line for block in blocks_of(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [line for line in re.findall(r"`([^`\n]+)`", prose_of(text)) if line.startswith(_STARTERS)]
    for line in lines:
        if "launch/" not in line or " ... " in f"{line} " or "$ deepspeed" in line:
            continue
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        script = next((number for number, word in enumerate(words) if _SCRIPT.match(word)), None)
        if script is not None and words[0].rpartition("/")[2] in _STARTERS:
            yield Command(path.name, words[script][7:-3], words[script + 1 :])
