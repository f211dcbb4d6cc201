"""The table that completion answers from is that of today's scripts and settings."""

from __future__ import annotations

import pytest

from ijepa_scale import registry
from ijepa_scale.completion import known
from ijepa_scale.completion.answers import TABLE


def test_the_table_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in vars(registry).values():
        if isinstance(each, registry.Registry):
            monkeypatch.setattr(each, "_added", {})  # what other tests have registered
    assert TABLE.read_text() == known.text(), "run: make docs"
