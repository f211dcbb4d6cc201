"""YAML text to plain values and back, by YAML 1.2's core schema: safe types only, no key twice, bounded in size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from ijepa_scale.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_MAX_DEPTH = 50  # levels; a configuration has 4
_MAX_NODES = 100_000  # values once each alias is replaced by what it stands for
_MAX_LENGTH = 1_000_000  # characters, which take a second; a configuration has some thousand
_MAX_DIGITS = 400  # of a whole number, leading zeros included


class _Written:
    """A number whose `str` is what the file writes, such as 0012 or 1.10, for settings that take text."""

    written: str

    def __str__(self) -> str:
        return self.written


class Whole(_Written, int):
    """A whole number that knows how it is written."""

    def __new__(cls, written: str, base: int = 10) -> Whole:  # noqa: D102
        number = super().__new__(cls, written, base)
        number.written = written
        return number

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return int, (int(self),)


class Real(_Written, float):
    """A number with a fraction or an exponent that knows how it is written."""

    def __new__(cls, written: str) -> Real:  # noqa: D102
        number = super().__new__(cls, re.sub(r"\.(?=inf|nan)", "", written.lower()))
        number.written = written
        return number

    def __reduce__(self) -> tuple[type, tuple[float]]:
        return float, (float(self),)


def plain(value: Any) -> Any:
    """Returns a value of `parse_yaml` with its numbers as Python's own, which don't know how they were written.

    Raises:
        ValueError: a whole number has more than 64 bits.
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(each) for each in value)
    if isinstance(value, Whole) and not -(2**63) <= value < 2**63:
        raise ValueError("give a whole number of 64 bits")
    return int(value) if isinstance(value, Whole) else float(value) if isinstance(value, Real) else value


# Source: YAML 1.2.2, section 10.3.2, and the merge key of YAML 1.1. PyYAML's own table is that of YAML 1.1, where 0012
# is octal, 1_000 and 1:30 are numbers, `on` is true and 1e-3 is text.
_WORDS = {
    "null": re.compile(r"null|Null|NULL|~|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "merge": re.compile(r"<<"),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML of the core schema, without repeated keys, keys that aren't single values, and endless aliases."""

    yaml_implicit_resolvers = {None: [(_TAG + kind, re.compile(f"(?:{_WORDS[kind].pattern})\\Z")) for kind in _WORDS]}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._anchors: list[str | None] = []  # of the nodes that are being read, outermost first
        self._sizes: dict[int, int] = {}  # of read nodes, by id
        self._count = 0  # of nodes that were begun

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node, refusing aliases that lead back to themselves, depth and size."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._anchors:
            raise _refused(f"the alias *{event.anchor} leads back to itself", event.start_mark)
        if len(self._anchors) >= _MAX_DEPTH:
            raise _refused(f"nested more than {_MAX_DEPTH} levels deep", event.start_mark)
        self._count += 1
        if self._count > _MAX_NODES:
            raise _refused(f"more than {_MAX_NODES} values", event.start_mark)
        self._anchors.append(getattr(event, "anchor", None))
        node = super().compose_node(parent, index)
        self._anchors.pop()
        if node is not None:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
            size = self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
            if size > _MAX_NODES:
                raise _refused(f"aliases stand for more than {_MAX_NODES} values", event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Returns the mapping of a node, refusing a key that appears twice."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key is a list or a mapping", key_node.start_mark)
            if key_node.value in seen and key_node.value != "<<":
                raise _refused(f"the key {key_node.value!r} appears twice", key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Returns the text of a scalar, refusing an explicit tag that it doesn't fit."""
        text = super().construct_scalar(node)
        form = _WORDS.get(node.tag.removeprefix(_TAG))
        if form is not None and not form.fullmatch(text):
            raise _refused(f"{text[:40]!r} doesn't fit its tag !!{node.tag.removeprefix(_TAG)}", node.start_mark)
        return text

    def _whole(self, node: yaml.ScalarNode) -> Whole:
        text = self.construct_scalar(node)
        if len(text) > _MAX_DIGITS:
            raise _refused(f"a number of {len(text)} digits", node.start_mark)
        return Whole(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def _truth(self, node: yaml.ScalarNode) -> bool:
        return self.construct_scalar(node).lower() == "true"

    def _real(self, node: yaml.ScalarNode) -> Real:
        return Real(self.construct_scalar(node))

    yaml_constructors = {
        **{_TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind] for kind in ("null", "str", "seq", "map")},
        _TAG + "bool": _truth,
        _TAG + "int": _whole,
        _TAG + "float": _real,
        None: yaml.SafeLoader.yaml_constructors[None],  # refuses all other tags
    }


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


class _Dumper(yaml.SafeDumper):
    """Block mappings, lists of single words in one line. Quotes a text that YAML takes for something else."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}


_Dumper.add_representer(  # sentences a line each, anything else in one line
    list,
    lambda dumper, items: dumper.represent_sequence(
        _TAG + "seq", items, flow_style=not any(isinstance(item, str) and " " in item for item in items)
    ),
)
_Dumper.add_representer(  # quotes for a line break that PyYAML would write as it is, and read back as a space
    str, lambda dumper, text: dumper.represent_scalar(_TAG + "str", text, '"' if "\x85" in text else None)
)


def parse_yaml(text: str, origin: str) -> Any:
    """Returns the plain value of a YAML text; `origin` names it in errors.

    Numbers are `Whole` and `Real`, which know how they were written.

    Raises:
        ConfigError: The text isn't YAML of plain types, a key appears twice or is no single value, an alias leads back
            to itself, or it is nested too deeply or too long.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError(
            f"{origin}: {len(text)} characters are too many for a configuration; give a file of at most {_MAX_LENGTH}"
        )
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        # an error about a character that YAML doesn't allow has no `problem`
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "; fill in the template's {{ }} first" if "{{" in text else ""
        raise ConfigError(f"{origin}: not readable as YAML{where}: {what}{hint}") from None


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
