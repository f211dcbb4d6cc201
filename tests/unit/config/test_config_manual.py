"""What is generated from the schema is up to date, and the files that we ship say only what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ijepa_scale.config import PretrainConfig, load_config
from ijepa_scale.config.files import known_keys
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.manual import generated, help_text
from ijepa_scale.config.section import Section
from ijepa_scale.config.yaml_text import flat, parse_yaml
from tests.unit.config.writing import load_shipped

ROOT = Path(__file__).parents[3]
FILES = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "configs" / "finetune").glob("*.yaml"))]


def kind_of(path: Path) -> type[Section]:
    return FinetuneConfig if path.parent.name == "finetune" else PretrainConfig


def value_at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize("path", generated())
def test_generated_files_are_up_to_date(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == generated()[path], f"{path} is stale; run make docs"


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_the_reference_has_every_setting(kind: type[Section]) -> None:
    page, text = (ROOT / "docs" / "configuration.md").read_text(), help_text(kind)
    for key in known_keys(kind):
        assert f"| `{key}` |" in page and f"  {key}  (" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_only_what_differs(path: Path) -> None:
    kind, content = kind_of(path), parse_yaml(path.read_text(), str(path))
    base = content.pop("base", None)
    below = (load_config(path.parent / base, kind=kind) if base else kind()).values()
    config = load_shipped(path, kind=kind).values()
    for key in flat(content).keys() - {"recipe"}:  # which is followed, and gone then
        assert value_at(config, key) != value_at(below, key), f"{key} is the default, or that of {base}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_names_its_schema(path: Path) -> None:
    prefix, first = "# yaml-language-server: $schema=", path.read_text().splitlines()[0]
    assert first.startswith(prefix)
    schema = json.loads((path.parent / first.removeprefix(prefix)).read_text())
    assert schema["description"] == kind_of(path).__doc__
    for key in flat(parse_yaml(path.read_text(), str(path))):
        assert list(found(schema, schema, key.split("."))), f"{key} isn't in the schema"


def found(schema: dict[str, Any], place: dict[str, Any], path: list[str]) -> Any:
    """Yields the places of a JSON Schema that describe a key."""
    if "$ref" in place:
        yield from found(schema, schema["$defs"][place["$ref"].rpartition("/")[2]], path)
    for each in place.get("anyOf", ()):
        yield from found(schema, each, path)
    if not path:
        yield place
    elif path[0] in place.get("properties", {}):
        yield from found(schema, place["properties"][path[0]], path[1:])


def test_the_schema_refuses_what_the_loader_refuses() -> None:
    schema = json.loads((ROOT / "configs" / "schema" / "pretrain.json").read_text())
    assert not list(found(schema, schema, ["masks", "min_kep"])) and schema["additionalProperties"] is False
    assert all(each["additionalProperties"] is False for name, each in schema["$defs"].items() if name != "SinkConfig")
    (places,) = found(schema, schema, ["engine", "strategy"])
    assert places["enum"] == ["auto", "plain", "ddp", "fsdp2", "deepspeed"]
    (*samplers, other) = found(schema, schema, ["masks", "sampler"])
    assert [each["enum"] for each in samplers] == [["multiblock", "reference"], ["random"]]
    assert other == {"not": {"enum": ["multiblock", "reference", "random"]}}  # a plugin's
