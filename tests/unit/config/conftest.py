from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.writing import write


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty configuration file."""
    return write(tmp_path, "c.yaml", "")
