"""YAML text to plain values and back: safe types only, no key twice, `1e-3` a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ijepa_scale.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Returns the mapping of a node, refusing a key that stands twice."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 (no point) is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class _Dumper(yaml.SafeDumper):
    """Block mappings with short lists in one line."""


def _represent_list(dumper: yaml.SafeDumper, values: list | tuple) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(tuple, _represent_list)


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
    """Returns `value` (plain types, tuples included) as YAML, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
