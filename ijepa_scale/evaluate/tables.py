"""Tables of texts, for terminals and in Markdown. Knows nothing of what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ijepa_scale.escapes import one_line


def as_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as lines of text, without columns that are empty."""
    lines = [columns, *rows]
    kept = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    widths = [max(len(row[index]) for row in lines) for index in kept]
    shown = ["  ".join(row[i].ljust(w) for i, w in zip(kept, widths, strict=True)).rstrip() for row in lines]
    return "\n".join([shown[0], "  ".join("-" * width for width in widths), *shown[1:]])


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], facts: Mapping[str, Any]) -> str:
    """Returns a table in Markdown, with facts below it."""
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    body = ["| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*head, *body, "", *(f"- {name}: {one_line(str(value))}" for name, value in facts.items()), ""])
