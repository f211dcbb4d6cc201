"""Configurations from YAML files and dotted overrides, and back. Reads files, knows no component.

Layers are laid one over another: the schema's defaults, the file's bases, the file, the overrides. All that is wrong
in any of them is told in one message, with where it came from. Published and earlier layouts are translated.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar

from ijepa_scale.config.earlier import renamed
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.form import Form, kind_of
from ijepa_scale.config.published import is_published, translate
from ijepa_scale.config.schema import PretrainConfig
from ijepa_scale.config.section import EXCLUSIVE, Section, settings
from ijepa_scale.config.yaml_text import flat, nest, parse_yaml, write_yaml
from ijepa_scale.environment import expand_path
from ijepa_scale.errors import ConfigError
from ijepa_scale.regular_file import read_regular
from ijepa_scale.shipped import elsewhere, find

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=Section)

_OTHER: dict[type, type[Section]] = {PretrainConfig: FinetuneConfig, FinetuneConfig: PretrainConfig}
_SCRIPT: dict[type, str] = {PretrainConfig: "launch/pretrain.py", FinetuneConfig: "launch/finetune.py"}
_TASK: dict[type, str] = {PretrainConfig: "pretraining", FinetuneConfig: "finetuning"}

Choose = Callable[[Mapping[str, Any]], dict[str, Any]]


class Loaded(NamedTuple):
    """A configuration and what was left out of the file, or renamed, on the way."""

    config: Any
    notes: list[str]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, kind: type[Config] = PretrainConfig) -> Config:  # type: ignore[assignment]
    """Returns the configuration of a file with dotted overrides (`optimizer.lr=1e-3`) on top, and logs the notes.

    Raises:
        ConfigError: See `read_config`.
    """
    loaded = read_config(path, overrides, kind=kind)
    for note in loaded.notes:
        logger.info("%s: %s", path, note)
    return loaded.config


def read_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: type = PretrainConfig,
    num_processes: int | None = None,
    needs_paths: bool = True,
    choose: Choose | None = None,
) -> Loaded:
    """Returns the configuration and the notes of a translation; `num_processes` only enriches those notes.

    Without `needs_paths`, a published file may have placeholders for paths, as it was published.

    If the configuration names a recipe, `choose` returns its settings, nested, for those given, nested: they are laid
    below all others.

    Raises:
        ConfigError: Missing or unreadable file, bases in a circle, unknown keys, wrong types, values
            outside their range, or a recipe without `choose`.
    """
    notes: list[str] = []
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}  # of dotted keys, those of later layers later
    reading = partial(
        translate, finetuning=kind is FinetuneConfig, num_processes=num_processes, needs_paths=needs_paths
    )
    layers = list(_files(str(path), Path(), (), notes, reading))
    below: Mapping[str, Any] = reduce(lambda low, high: _laid(low, high), (content for _, content in layers), {})
    layers.append(("command line", nest(_parse_overrides(overrides, kind, below))))
    for origin, content in layers:
        layer = renamed(content, kind, notes)
        values = _laid(values, layer)
        for key in flat(layer):
            origins.pop(key, None)
            origins[key] = origin
    try:
        if values.get("recipe") is not None:
            values = _followed(values, choose, kind)
        return Loaded(kind(**values), notes)
    except ConfigError as error:
        alien = _of_other_kind(kind, layers, path)
        lines = sorted((_placed(_explained(line, alien, kind), origins) for line in error.problems), key=itemgetter(0))
        raise ConfigError(*(line for _, line in lines)) from None


def _of_other_kind(kind: type[Section], layers: Sequence[tuple[str, dict[str, Any]]], path: str | Path) -> set[str]:
    """Returns the settings that only the other kind of run knows.

    Raises:
        ConfigError: there are some, and none that only this kind knows.
    """
    values: Mapping[str, Any] = reduce(lambda low, high: _laid(low, high), (content for _, content in layers), {})
    if kind not in _OTHER:
        return set()
    ours, theirs = _known_of(values, kind), _known_of(values, _OTHER[kind])
    alien = [key for key in flat(values) if key in theirs - ours]
    if alien and not ours - theirs:
        other = _OTHER[kind]
        found = f"{alien[0]} and {len(alien) - 1} more are" if len(alien) > 1 else f"{alien[0]} is"
        kinds = "settings" if len(alien) > 1 else "a setting"
        raise ConfigError(
            f"{path}: {found} {kinds} of {_TASK[other]}; start it with {_SCRIPT[other]}, or name another file"
        ) from None
    return set(alien)


def _explained(line: str, alien: set[str], kind: type[Section]) -> str:
    """Returns a complaint, or a better one about a setting that only the other kind of run knows."""
    key = line.partition(":")[0]
    if key not in alien:
        return line
    return f"{key}: only {_TASK[_OTHER[kind]]} has this setting; remove it"


def _known_of(values: Mapping[str, Any], kind: type[Section]) -> set[str]:
    """Returns the dotted names among the settings that a kind of run knows, by today's names or earlier ones."""
    known = {key for key, _ in settings(kind, renamed(values, kind, []))}
    return {key for key, value in flat(values).items() if known & flat(renamed(nest({key: value}), kind, [])).keys()}


def _followed(values: dict[str, Any], choose: Choose | None, kind: type[Section]) -> dict[str, Any]:
    """Returns the settings with those that their recipe chooses, and without the recipe."""
    kind(recipe=values["recipe"])  # refuses an unknown one
    if choose is None:
        raise ConfigError(
            f"recipe is {values['recipe']}, which chooses settings by the images and the machine when a run begins; "
            "give the config.yaml of the run's folder here, or the file that `launch/pretrain.py --print-config` prints"
        )
    return {**_laid(choose(values), values), "recipe": None}


def to_yaml(config: Section) -> str:
    """Returns the configuration as YAML that `load_config` reads back to an equal one."""
    return write_yaml(config.values())


def known_keys(config: Section | type[Section]) -> list[str]:
    """Returns the dotted names of all settings, in order; of a class, with the sections chosen by default."""
    return [key for key, _ in settings(config if isinstance(config, type) else type(config), config)]


def _files(
    named: str,
    beside: Path,
    below: tuple[Path, ...],
    notes: list[str],
    reading: Callable[..., tuple[dict[str, Any], list[str]]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what a file holds with its name, its bases first.

    `named` is relative to the folder `beside`, or names a file of the package. `below` led here; `reading` translates.
    """
    path = find(named, beside)
    if path != beside / named:
        notes.append(f"{named} is the package's, {path}")
    resolved = path.resolve()
    if resolved in below:
        circle = " -> ".join(str(p.name) for p in (*below[below.index(resolved) :], resolved))
        raise ConfigError(f"{path}: its base leads back to itself ({circle}); remove one `base`")
    try:
        content = parse_yaml(_text_in(read_regular(path), path), str(path))
    except FileNotFoundError:
        asked = f" (the base of {below[-1]})" if below else ""
        asked += elsewhere(named, beside)
        raise ConfigError(f"{path}: no such configuration file{asked}; configs/ holds ready ones") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); name a YAML file") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {kind_of(content)}; a configuration is a mapping of sections")
    if is_published(content):
        content, said = reading(content, origin=str(path))
        notes.extend(said)
    base = content.pop("base", None)
    if not isinstance(base, (str, NoneType)):
        raise ConfigError(f"{path}: base is {base!r}; name one file, relative to this one")
    if base is not None:
        over = (*below, resolved)
        try:
            lower = expand_path(base)
        except ConfigError as error:
            raise ConfigError(f"{path}: base is {base!r}; {error}") from None
        yield from _files(lower, path.parent, over, notes, reading)
    yield str(path), content


def _text_in(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        what = "it is UTF-16 or UTF-32" if wide else error
        raise ConfigError(f"{path}: can't be read as a text file ({what}); save it as UTF-8") from None
    if "\0" in text[:4]:  # without a byte order mark
        raise ConfigError(f"{path}: can't be read as a text file (it is UTF-16, or no text); save it as UTF-8")
    return text


def _parse_overrides(texts: Sequence[str], kind: type[Section], below: Mapping[str, Any]) -> dict[str, Any]:
    """Returns dotted settings; a value is YAML, or as it stands where text is wanted. `below` chooses sections."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, raw = text.partition("=")
        if equals and not key.strip():
            raise ConfigError(f"override {text!r} has no key; write section.key=value, e.g. optimizer.lr=1e-3")
        if not equals:
            raise ConfigError(f"override {text!r} has no `=`; write section.key=value, e.g. optimizer.lr=1e-3")
        pairs[key.strip()] = raw
    fields = dict(settings(kind, renamed(_laid(below, nest(pairs)), kind, [])))
    found: dict[str, Any] = {}
    for key, raw in pairs.items():
        (name,) = flat(renamed(nest({key: raw}), kind, []))
        takes_text = name in fields and Form(fields[name]).takes_text
        found |= flat({key: _text(raw) if takes_text else parse_yaml(raw, f"override {f'{key}={raw}'!r}")})
    return found


def _text(raw: str) -> str | None:
    """Returns the text of an override as it is written, without the quotes around it; None for YAML's words for it."""
    text = raw.strip()
    if text[:1] not in ("'", '"') or text[-1:] != text[:1]:
        return None if text in ("", "~", "null", "Null", "NULL") else text
    try:
        value = parse_yaml(text, "override")
    except ConfigError:  # 'a' and 'b'
        return text
    return value if isinstance(value, str) else text


def _laid(below: Mapping[str, Any], layer: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Returns `layer` over `below`: sections are merged, and of two exclusive settings the one below goes."""
    merged = dict(below)
    for key, value in layer.items():
        old = merged.get(key)
        if isinstance(value, Mapping):
            merged[str(key)] = _laid(old if isinstance(old, Mapping) else {}, value, f"{at}.{key}".strip("."))
        elif value is not None or not isinstance(old, Mapping):  # an empty section sets nothing
            merged[str(key)] = value
            other = EXCLUSIVE.get((at, str(key)), "")
            if value is not None and layer.get(other) is None:
                merged.pop(other, None)
    return merged


def _placed(line: str, origins: Mapping[str, str]) -> tuple[int, str]:
    """Returns a complaint with the origin of the setting that it begins with, and the place of that setting."""
    key = line.split(" ", 1)[0].rstrip(":")
    places = [place for place, name in enumerate(origins) if name == key or name.startswith(f"{key}.")]
    return (places[-1], f"{list(origins.values())[places[-1]]}: {line}") if places else (len(origins), line)
