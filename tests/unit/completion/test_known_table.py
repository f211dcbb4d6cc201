"""The table that completion answers from is that of today's scripts and settings."""

from __future__ import annotations

from ijepa_scale.completion import known
from ijepa_scale.completion.answers import TABLE


def test_the_table_is_up_to_date() -> None:
    assert TABLE.read_text() == known.text(), "run: make docs"
