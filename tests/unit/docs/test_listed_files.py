"""Tables of the shipped configurations name every file."""

from __future__ import annotations

import re

import pytest
from pages import DOCS, ROOT, text_of

TABLES = {"configs": "pretraining.md", "configs/finetune": "finetuning.md", "ds_configs": "engines.md"}


@pytest.mark.parametrize("folder", TABLES)
def test_each_file_has_a_row(folder: str) -> None:
    rows = "\n".join(re.findall(r"^\| (`[^|]*) \|", text_of(DOCS / TABLES[folder]), flags=re.MULTILINE))
    files = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
    assert {*re.findall(r"`(\w[\w-]*\.(?:yaml|json))`", rows)} == files
