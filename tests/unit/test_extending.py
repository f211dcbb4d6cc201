"""The page on extending tells the truth: its files exist, are as long as it says, and are registered once."""

import re
from pathlib import Path

import pytest

from ijepa_scale import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| [\w ]+ \| `([\w.]+)` \|.*?\]\(\.\./(ijepa_scale/[\w/]+\.py)\) \| (\d+) \|", PAGE, flags=re.MULTILINE
)
REGISTRIES = (
    registry.OBJECTIVES, registry.SAMPLERS, registry.OPTIMIZERS, registry.EVALUATORS, registry.SINKS, registry.SOURCES,
)  # fmt: skip


def test_there_is_a_row_for_each_kind() -> None:
    assert len(ROWS) == len(REGISTRIES)


@pytest.mark.parametrize(("setting", "path", "lines"), ROWS)
def test_a_row_counts_the_lines_of_its_file(setting: str, path: str, lines: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) == int(lines), (
        f"{path}: correct docs/extending.md"
    )


def test_the_example_outside_the_package_is_as_long_as_the_page_says() -> None:
    (said,) = re.findall(r"in (\d+) lines in all", PAGE)
    example = ROOT / "tests" / "unit" / "train" / "my_components.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) == int(said)


@pytest.mark.parametrize("kind", REGISTRIES, ids=lambda kind: kind.kind)
def test_every_name_of_the_package_leads_to_a_component(kind: registry.Registry) -> None:
    assert kind.names()
    for name in kind.names():
        assert callable(kind.get(name))


def test_links_lead_to_files() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
