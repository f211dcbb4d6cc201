"""The page about migrating names every key of the published layouts, with what becomes of it."""

from __future__ import annotations

import re

import pytest
from pages import DOCS, text_of

from ijepa_scale.config import published

PAGE = text_of(DOCS / "migrating.md")
TABLES = {
    "pretraining": re.search(r"## Keys of a pretraining file\n(.*?)\n## ", PAGE, flags=re.DOTALL),
    "finetuning": re.search(r"## Keys of the fork's finetuning file\n(.*?)\n## ", PAGE, flags=re.DOTALL),
}
KNOWN = {
    "pretraining": (published._PRETRAINING, {*published._IGNORED}),
    "finetuning": (published._FINETUNING, {*published._IGNORED_FINETUNING, *published._NOTED_FINETUNING}),
}


def rows(kind: str) -> dict[str, tuple[str, str]]:
    """Returns each key of a table with its two other cells."""
    found, table = {}, TABLES[kind]
    assert table is not None
    for keys, ours, note in re.findall(r"^\| (`.+?) \| (.*?) ?\| (.*?) ?\|$", table[1], flags=re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`([\w.]+)`", keys), (ours, note))
    return found


@pytest.mark.parametrize("kind", KNOWN)
def test_each_key_has_a_row(kind: str) -> None:
    moved, ignored = KNOWN[kind]
    every = {*moved, *ignored, *published._REQUIRED, *published._SWITCHES, "meta.read_checkpoint"}
    every |= {"data.color_jitter_strength"}
    assert set(rows(kind)) == every


@pytest.mark.parametrize("kind", KNOWN)
def test_a_row_tells_what_becomes_of_its_key(kind: str) -> None:
    moved, ignored = KNOWN[kind]
    table = rows(kind)
    for key, ours in moved.items():
        assert f"`{ours}`" in table[key][0], key
    for key in ignored - moved.keys():
        assert not table[key][0] and "ignored" in table[key][1] or "warm-up" in table[key][1], key
