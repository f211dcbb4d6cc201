"""Configuration files that the tests write, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ijepa_scale.config import load_config
from ijepa_scale.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    """Returns a new file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> list[str]:
    """Returns the lines of the error that a file with these overrides raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()
