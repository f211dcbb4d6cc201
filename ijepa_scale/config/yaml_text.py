"""YAML text to plain values and back: safe types only, no key twice, `1e-3` a number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ijepa_scale.errors import ConfigError

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Returns the mapping of a node, refusing a key that stands twice."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a list or a mapping", problem_mark=key_node.start_mark)
            if key_node.value in seen and key_node.value != "<<":
                problem = f"the key {key_node.value!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 (no point) is text.
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """Block mappings with short lists in one line."""


_Dumper.add_representer(list, lambda dumper, each: dumper.represent_sequence(_TAG + "seq", each, flow_style=True))
_Dumper.add_representer(  # quotes for a line break that PyYAML would write as it is, and read back as a space
    str, lambda dumper, text: dumper.represent_scalar(_TAG + "str", text, '"' if "\x85" in text else None)
)


def parse_yaml(text: str, origin: str) -> Any:
    """Returns the plain value of a YAML text; `origin` names it in errors.

    Raises:
        ConfigError: The text isn't YAML of plain types, or a key stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{origin}: not readable as YAML{where}: {what}") from None


def write_yaml(value: Any) -> str:
    """Returns `value` (plain types) as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flat(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as dotted keys and values; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted settings as nested mappings."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *path, name = key.split(".")
        place = nested
        for part in path:
            inner = place.get(part)
            place[part] = place = inner if isinstance(inner, dict) else {}
        place[name] = value
    return nested
