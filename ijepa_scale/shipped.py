"""Finds the folders `launch`, `configs` and `ds_configs`, which ship with the package. Knows nothing of their content.

In a checkout, and so after `pip install -e .`, they are the repository's; setup.py puts copies into a wheel.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CONFIG_FOLDERS = ("configs", "ds_configs")
_PACKAGE = Path(__file__).parent
_LAUNCHER = r"\b(?:torchrun|deepspeed) (?:-\S+ |\S*[\d$]\S* |[A-Z_]+ )*"  # with its flags and their values
_MENTION = re.compile(rf"({_LAUNCHER}|\bpython )?(?<![\w./~-])launch/([a-z]\w*)\.py\b")


def is_installed() -> bool:
    """Returns whether this is an installed copy, and not a checkout."""
    return (_PACKAGE / "_repository").is_dir()


def folder(name: str) -> Path:
    """Returns `launch`, `configs` or `ds_configs`."""
    return (_PACKAGE / "_repository" if is_installed() else _PACKAGE.parent) / name


def find(path: str | Path, beside: Path = Path()) -> Path:
    """Returns the path, relative to the folder `beside`, or that of a shipped file if there is nothing at the path.

    Only a relative path that begins with `configs/` or `ds_configs/` stands for a shipped file.
    """
    given = beside / path
    try:
        given.lstat()
    except (FileNotFoundError, NotADirectoryError):
        other = _shipped(path)
        return other if other is not None and other.exists() else given
    except (OSError, ValueError):  # the reader tells what is wrong with it
        pass
    return given


def elsewhere(path: str | Path, beside: Path = Path()) -> str:
    """Returns what to add about a file that `find` doesn't find: where else it looked, or nothing."""
    other = _shipped(path)
    return "" if other is None or other == (beside / path).absolute() else f", nor is there {other}"


def _shipped(path: str | Path) -> Path | None:
    parts = Path(path).parts
    if parts[:1] and parts[0] in CONFIG_FOLDERS and ".." not in parts:
        return folder(parts[0]).joinpath(*parts[1:])
    return None


def as_called(text: str) -> str:
    """Returns a text in which the launch scripts are called as the user calls them: through `ijepa` or by their path.

    `python launch/plan.py` becomes `ijepa plan`, and `torchrun launch/pretrain.py` `torchrun -m ijepa_scale pretrain`,
    if this process was started through `ijepa` or there is no checkout.
    """
    if "launch/" not in text or not (sys.argv[0].startswith("ijepa ") or is_installed()):
        return text
    return _MENTION.sub(_called, text)


def _called(match: re.Match[str]) -> str:
    before, name = match[1] or "", match[2]
    if not (folder("launch") / f"{name}.py").is_file():
        return match[0]
    if before in ("", "python "):
        return f"ijepa {name}"
    return f"{before}{'-m' if before.startswith('torchrun') else '--module'} ijepa_scale {name}"
