"""The site builds without a warning, and its pages ask no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT

FETCHED = re.compile(r"""<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=["']?((?:https?:)?//[^"'\s>]+)""")


@pytest.mark.long
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    built = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"}
    assert built == {path.stem for path in DOCS.glob("*.md")}
    for path in (tmp_path / "site").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not FETCHED.findall(text), path.name
        assert "../ijepa_scale/" not in text, path.name


def test_what_is_fetched_is_found() -> None:
    page = '<link rel="x" href="https://fonts.example/a.css"><script src=//cdn.example/b.js></script><img src="c.png">'
    assert FETCHED.findall(page) == ["https://fonts.example/a.css", "//cdn.example/b.js"]
