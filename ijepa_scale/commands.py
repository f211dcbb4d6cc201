"""The command `ijepa`, which runs the launch scripts by their names from any folder. Must not import torch.

`ijepa plan ARGUMENTS` is `python launch/plan.py ARGUMENTS`. A script is a command by being in `launch/`.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from ijepa_scale import __version__, shipped, terminal
from ijepa_scale.errors import UserError
from ijepa_scale.nearest import nearest

_RANK = re.compile(r"--local[-_]rank=\d+", re.ASCII)  # launchers write it before the arguments
_LAST_LINES = (
    "ijepa COMMAND --help explains a command, and ijepa completion how Tab completes commands, flags and settings.",
    "Launchers start the same commands, as in: torchrun --nproc-per-node 8 -m ijepa_scale pretrain --config C.yaml",
)


def main() -> int:
    """Runs the command that the arguments name, or returns the exit code of the listing: 0, or 2 for a mistake."""
    words = sys.argv[1:]
    ranks = [word for word in words[:1] if _RANK.fullmatch(word)]
    words, known = words[len(ranks) :], scripts()
    if not words or words[0] not in known:
        return _answer(words)
    sys.argv = [f"ijepa {words[0]}", *ranks, *words[1:]]
    run(known[words[0]])
    return 0


def run(script: Path) -> None:
    """Runs a script as Python would. `runpy` would put its path into sys.argv, and so into its messages."""
    main = ModuleType("__main__")
    main.__file__ = str(script)  # child processes find it here
    sys.modules["__main__"] = main
    SourceFileLoader("__main__", str(script)).exec_module(main)


def scripts() -> dict[str, Path]:
    """Returns the launch scripts by the names of their commands, in order."""
    return {path.stem: path for path in sorted(shipped.folder("launch").glob("[a-z]*.py"))}


def listing() -> str:
    """Returns all commands, each with the first sentence of its script."""
    found = {name: summary(path) for name, path in scripts().items()}
    width = max(map(len, found), default=0)
    lines = (f"  {name:{width}}  {text}" for name, text in found.items())
    return "\n".join(["usage: ijepa COMMAND ...", "", *lines, "", *_LAST_LINES])


def summary(path: Path) -> str:
    """Returns the first sentence of a script, without running it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


@terminal.command
def _answer(words: list[str] | None) -> int:
    """Prints the listing or the version.

    Raises:
        UserError: the arguments name no command.
    """
    if words in ([], ["-h"], ["--help"]):
        terminal.say(*listing().splitlines())
        return 0
    if words == ["--version"]:
        terminal.say(f"ijepa_scale {__version__}")
        return 0
    name = words[0] if words else ""
    if name.startswith("-"):
        raise UserError(f"{name}: give a command before its flags; ijepa --help lists them")
    near = nearest(name, scripts())
    raise UserError(f"{name}: no such command; {f'did you mean ijepa {near}?' if near else 'ijepa --help lists them'}")
