"""Configurations from YAML files and dotted overrides, and back. Reads files, knows no component.

Layers are laid one over another: the schema's defaults, the file's bases, the file, the overrides.
Every unknown key and mistyped value of all layers is told in one message, with where it came from.
A file in the published layout is translated on the way in.
"""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.nearest import nearest, nearest_dotted
from ijepa_scale.config.published import is_published, translate
from ijepa_scale.config.published_finetune import translate_finetuning
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.config.yaml_text import parse_yaml, write_yaml
from ijepa_scale.errors import ConfigError

logger = logging.getLogger(__name__)

Config = TypeVar("Config")

# Setting one in a layer clears the other from the layers below.
EXCLUSIVE = (("data.batch_size", "data.batch_size_per_process"), ("optimizer.base_lr", "optimizer.lr"))


@dataclass(frozen=True)
class Layer:
    """Settings of one origin, with dotted keys."""

    origin: str  # what error messages call it: a file name, or "command line"
    settings: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A configuration and what was left out of the file on the way."""

    config: Any
    notes: list[str]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: type[Config] = PretrainConfig) -> Config:  # type: ignore[assignment]
    """Returns the configuration of a file with dotted overrides (`optimizer.lr=1e-3`) on top.

    What a published file says and this package ignores is logged; `read_config` returns it.

    Raises:
        ConfigError: See `read_config`.
    """
    loaded = read_config(path, overrides, kind=kind)
    for note in loaded.notes:
        logger.info("%s: %s", path, note)
    return loaded.config


def read_config(
    path: str | Path, overrides: Sequence[str] = (), *, kind: type = PretrainConfig, num_processes: int | None = None
) -> Loaded:
    """Returns the configuration and the notes of a translation; `num_processes` only enriches those notes.

    Raises:
        ConfigError: Missing or unreadable file, bases in a circle, unknown keys, wrong types, values
            outside their range.
    """
    notes: list[str] = []
    layers = _file_layers(Path(path), (), notes, kind=kind, num_processes=num_processes)
    layers.append(Layer("command line", dict(_parse_override(text, kind) for text in overrides)))
    return Loaded(_assemble(layers, kind), notes)


def to_yaml(config: Any) -> str:
    """Returns the configuration as YAML that `load_config` reads back to an equal one."""
    return write_yaml(dataclasses.asdict(config))


def known_keys(kind: type) -> dict[str, Any]:
    """Returns the dotted names of all settings of a configuration class with their types, in order."""
    return dict(_walk_fields(kind, ""))


def _walk_fields(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    for each in dataclasses.fields(kind):
        hint = hints[each.name]
        if dataclasses.is_dataclass(hint):
            yield from _walk_fields(typing.cast(type, hint), f"{prefix}{each.name}.")
        else:
            yield f"{prefix}{each.name}", hint


def _file_layers(
    path: Path, below: tuple[Path, ...], notes: list[str], *, kind: type, num_processes: int | None
) -> list[Layer]:
    """Returns the layers of a file, its bases first. `below` are the files that led here."""
    resolved = path.resolve()
    if resolved in below:
        circle = " -> ".join(str(p.name) for p in (*below[below.index(resolved) :], resolved))
        raise ConfigError(f"{path}: its base leads back to itself ({circle}); remove one `base`")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        asked = f" (the base of {below[-1]})" if below else ""
        raise ConfigError(f"{path}: no such configuration file{asked}; configs/ holds ready ones") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a text file ({error}); give a YAML file") from None
    content = parse_yaml(text, str(path))
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; a configuration is a mapping of sections")
    if is_published(content):
        translator = translate_finetuning if kind is FinetuneConfig else translate
        content, said = translator(content, num_processes=num_processes, origin=str(path))
        notes.extend(said)
    base = content.pop("base", None)
    layers: list[Layer] = []
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base is {base!r}; name one file, relative to this one")
        layers = _file_layers(path.parent / base, (*below, resolved), notes, kind=kind, num_processes=num_processes)
    return [*layers, Layer(str(path), dict(_flatten(content, "")))]


def _flatten(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields the dotted keys and values of nested mappings; an empty section is one key with None."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if isinstance(value, Mapping) else value


def _parse_override(text: str, kind: type) -> tuple[str, Any]:
    """Returns the key and value of `section.key=value`; the value is YAML, or plain text where text is wanted."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {text!r} has no `=`; write section.key=value, e.g. optimizer.lr=1e-3")
    wants_text = str in _alternatives(known_keys(kind).get(key))
    try:
        value = parse_yaml(raw, f"override {text!r}")
    except ConfigError:
        if not wants_text:
            raise
        return key, raw
    return key, value if not wants_text or value is None or isinstance(value, str) else raw.strip()


def _assemble(layers: Sequence[Layer], kind: type) -> Any:
    """Returns the configuration that the layers make, or raises with everything that is wrong."""
    known = known_keys(kind)
    sections = {key.rpartition(".")[0] for key in known} - {""}
    merged = OmegaConf.structured(kind)
    for section in ("", *sections):  # frozen dataclasses come out read-only
        OmegaConf.set_readonly(OmegaConf.select(merged, section) if section else merged, False)
    problems: list[str] = []
    origins: dict[str, str] = {}
    untyped: dict[str, Any] = {}  # pairs and triples, which the dataclasses check by themselves
    for layer in layers:
        settings = {}
        for key, value in _nested_keys(layer.settings):
            if key in known:
                settings[key] = value
            elif key in sections:
                if value is not None:  # `data:` with nothing below it sets nothing
                    problems.append(f"{layer.origin}: {key} is {value!r}; it is a section, set {key}.<name> instead")
            else:
                problems.append(f"{layer.origin}: {_unknown(key, known, sections)}")
        for pair in EXCLUSIVE:
            for key, other in (pair, pair[::-1]):
                if settings.get(key) is not None and other in known:
                    settings.setdefault(other, None)
        for key, value in settings.items():
            origins[key] = layer.origin
            if known[key] is Any:
                untyped[key] = value
                continue
            problem = _set(merged, key, value, known[key])
            if problem:
                problems.append(f"{layer.origin}: {problem}")
    if problems:
        raise ConfigError("\n".join(problems))
    content = typing.cast(dict, OmegaConf.to_container(merged, resolve=False))
    for key, value in untyped.items():
        section, _, name = key.rpartition(".")
        (content[section] if section else content)[name] = value
    return _build(kind, content, origins)


def _nested_keys(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields settings with mappings among the values opened, as an override `model={depth: 3}` has them."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value


def _unknown(key: str, known: Mapping[str, Any], sections: Collection[str]) -> str:
    near = nearest_dotted(key, known) if "." in key else nearest(key, sections) or nearest_dotted(key, known)
    if near:
        return f"{key}: unknown; did you mean {near}?"
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    choices = siblings or sorted({k.partition(".")[0] for k in known})
    return f"{key}: unknown; there are {', '.join(choices)}"


def _set(merged: Any, key: str, value: Any, hint: Any) -> str | None:
    """Sets one value and returns None, or returns what is wrong with it."""
    expected = _expected(hint)
    if isinstance(value, str) and "${" in value:
        return f"{key} is {value!r}; interpolations aren't read, write the value itself"
    if isinstance(value, bool) and bool not in _alternatives(hint):
        return f"{key} is {value!r}; give {expected}"
    if isinstance(value, int) and not isinstance(value, bool) and bool in _alternatives(hint):
        return f"{key} is {value!r}; give {expected}"
    try:
        OmegaConf.update(merged, key, value, merge=False)
    except OmegaConfBaseException:
        return f"{key} is {value!r}; give {expected}"
    return None


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _expected(hint: Any) -> str:
    """Returns what a field of this type wants, in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return " or ".join(words.get(each, str(each)) for each in _alternatives(hint))


def _build(kind: type, content: dict[str, Any], origins: Mapping[str, str]) -> Any:
    """Returns the dataclass made of `content`; what several sections refuse comes in one message."""
    hints = typing.get_type_hints(kind)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for name, value in content.items():
        try:
            values[name] = hints[name](**value) if dataclasses.is_dataclass(hints[name]) else value
        except ConfigError as error:
            problems.extend(_with_origin(line, origins) for line in str(error).splitlines())
    if not problems:
        try:
            return kind(**values)
        except ConfigError as error:
            problems.extend(_with_origin(line, origins) for line in str(error).splitlines())
    raise ConfigError("\n".join(problems))


def _with_origin(line: str, origins: Mapping[str, str]) -> str:
    """Returns a section's complaint with the origin of the setting that it begins with, if a layer set it."""
    origin = origins.get(line.split(" ", 1)[0].rstrip(":"))
    return f"{origin}: {line}" if origin else line
