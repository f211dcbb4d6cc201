"""What MkDocs does to links that leave docs/: on the site there is nothing behind them, so they become text.

On a page in the repository, `[protocol](../ijepa_scale/train/task.py)` opens the file. On the site it reads
`protocol (ijepa_scale/train/task.py)`, or only the text where that ends with the path already.
"""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns the page without links to files outside docs/."""
    return _OUTSIDE.sub(_as_text, markdown)


def _as_text(match: re.Match[str]) -> str:
    text, path = match["text"], match["path"]
    return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"
