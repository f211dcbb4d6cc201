"""Each message on the page about troubleshooting is one that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from pages import DOCS, ROOT, text_of

ENTRIES = re.findall(r"^\*\*`(.+)`\*\*(.*)$", text_of(DOCS / "troubleshooting.md"), flags=re.MULTILINE)
OTHERS = "(PyTorch's own message)"


def normalised(text: str) -> str:
    """Returns a message in which `…` stands for each value, and what is around it."""
    return re.sub(r"…+", "…", re.sub(r"%[\d.]*[srdfg]", "…", text))


def texts(tree: ast.AST) -> Iterator[str]:
    """Yields the texts of a file, with `…` for each value in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def messages() -> str:
    files = [path for folder in ("ijepa_scale", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(normalised(text) for path in files for text in texts(ast.parse(text_of(path))))


def exists(entry: str, messages: str) -> bool:
    return normalised(entry).strip("…") in messages


@pytest.mark.parametrize("entry", [entry for entry, rest in ENTRIES if OTHERS not in rest])
def test_a_message_exists(entry: str, messages: str) -> None:
    assert exists(entry, messages), f"no message of the code reads: {entry}"


def test_a_message_that_is_gone_is_found(messages: str) -> None:
    assert len(ENTRIES) > 40
    assert not exists("folder … is used by …; wait for it, or set another folder", messages)
