"""Links and anchors of the documentation lead somewhere, and the site has every page."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from pages import DOCS, PAGES, ROOT, prose_of, text_of

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", flags=re.MULTILINE)


def slugs(heading: str) -> tuple[str, str]:
    """Returns the anchors that GitHub and the site give a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    words = re.sub(r"[^\w\s-]", "", text).strip().lower()
    return words.replace(" ", "-"), re.sub(r"[\s-]+", "-", words)


@cache
def anchors(path: Path) -> tuple[frozenset[str], frozenset[str]]:
    github, site = zip(*(slugs(heading) for heading in HEADING.findall(prose_of(text_of(path)))), strict=True)
    return frozenset(github), frozenset(site)


def broken(path: Path, text: str) -> list[str]:
    """Returns what is wrong with the links of a page."""
    problems = []
    for link in LINK.findall(prose_of(text)):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            problems.append(f"{path.name}: {link} leads nowhere")
        elif anchor and not all(anchor in found for found in anchors(target)):
            problems.append(f"{path.name}: {link} names no heading, on GitHub or on the site")
    return problems


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    assert not broken(path, text_of(path))


def test_a_broken_link_is_found() -> None:
    page = DOCS / "faq.md"
    found = broken(page, "[a](nothing.md) [b](health.md#nowhere) [c](health.md#the-alarm) ![d](pictures_masks.png)")
    assert [line.split(" ")[1] for line in found] == ["nothing.md", "health.md#nowhere"]


def listed(entry: object) -> list[str]:
    """Returns the pages in a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in listed(inner)]  # type: ignore[attr-defined]


def test_the_navigation_has_each_page_once() -> None:
    pages = listed(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"])
    assert sorted(pages) == sorted(path.name for path in DOCS.glob("*.md"))


def test_links_out_of_the_site_become_text() -> None:
    spec = importlib.util.spec_from_file_location("site_links", DOCS / ".site" / "links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = "[`optim/lars.py`](../ijepa_scale/optim/lars.py), [protocol](../a/b.py#L3), [data](data.md), ![x](x.png)"
    expected = "`ijepa_scale/optim/lars.py`, protocol (`a/b.py`), [data](data.md), ![x](x.png)"
    assert module.on_page_markdown(page) == expected
