"""What processes compare before they train: what a number depends on, and of a path what it leads to."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ijepa_scale.train.facts import facts_of
from tests.unit.train.test_saver import configured
from tests.unit.train.test_start import data

__all__ = ["data"]


@pytest.mark.parametrize(
    ("setting", "value", "compared"),
    [
        ("optimizer__lr", "2e-3", ["optimizer.lr"]),
        ("seed", "9", ["seed"]),
        ("data__workers", "7", []),
        ("data__prefetch", "5", []),
        ("engine__start_timeout", "9", []),
        ("engine__link_timeout", "9", ["engine.link_timeout"]),
    ],
)
def test_settings_are_compared_unless_each_host_may_choose(
    setting: str, value: str, compared: list[str], tmp_path: Path, data: Path
) -> None:
    ours, theirs = (facts_of(configured(tmp_path, data, "run", **given)) for given in ({}, {setting: value}))
    assert [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)] == compared


def test_of_files_the_content_counts(tmp_path: Path, data: Path) -> None:
    path, copied, other = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    path.write_text("photo 1\n")
    shutil.copy(path, copied)
    other.write_text("photo 2\n")
    said = [facts_of(configured(tmp_path, data, "run", data__subset=each)) for each in (path, copied, other)]
    assert said[0] == said[1] and said[0] != said[2]


def test_what_a_recipe_chose_for_a_host_is_not_compared() -> None:
    config: Any = SimpleNamespace(chosen_by_recipe=("data.workers=1: one core",))
    assert facts_of(config) == {}
