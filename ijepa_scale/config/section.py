"""What a section of a configuration is: a frozen pydantic model, read strictly, whose errors say what to give.

A section whose class names a registry is read as the section of the component chosen in it. Knows no component.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from types import NoneType
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from typing_extensions import Self

from ijepa_scale.config.form import Form
from ijepa_scale.config.yaml_text import Real, Whole, flat, plain
from ijepa_scale.environment import LiteralPath, check_filled, written_path
from ijepa_scale.errors import ConfigError
from ijepa_scale.nearest import unknown
from ijepa_scale.registry import Registry

# Of two such settings of a section, giving one takes the other back: (section, setting) -> the other.
EXCLUSIVE = {
    ("data", "batch_size"): "batch_size_per_process", ("data", "batch_size_per_process"): "batch_size",
    ("optimizer", "base_lr"): "lr", ("optimizer", "lr"): "base_lr",
}  # fmt: skip


class Section(BaseModel):
    """Settings that belong together.

    Class arguments: `at` is the section's key in a file. If components can be chosen in it, `registry` holds them and
    `selector` is the field that names one: the `Config` of its class, a subclass of this section, reads the section.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    at: ClassVar[str] = ""
    registry: ClassVar[Registry | None] = None
    selector: ClassVar[str] = ""

    def __init_subclass__(cls, *, at: str = "", registry: Registry | None = None, selector: str = "") -> None:
        super().__init_subclass__()
        cls.at = at or cls.at
        if registry is not None:
            cls.registry, cls.selector = registry, selector

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(*dict.fromkeys(explain(type(self), values, error))) from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic reads sections inside by itself

    def replace(self, **changes: Any) -> Self:
        """Returns the section with these fields changed, checked as a new one is."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def values(self) -> dict[str, Any]:
        """Returns the settings as plain values, as JSON gives them back and a file holds them."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields}

    def _problems(self) -> Iterator[str]:
        """Yields what is wrong among fields that are right by themselves; each begins with the name of one."""
        yield from ()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of the components that may stand here."""
        return cls.registry.names() if cls.registry else ()

    @classmethod
    def member(cls, name: str) -> type[Section]:
        """Returns the section of a component; this class where none has that name.

        Raises:
            ConfigError: the component's `Config` is no subclass of this class.
        """
        if cls.registry is None or name not in cls.names():
            return cls
        config = getattr(cls.registry.get(name), "Config", cls)
        if not issubclass(config, cls):
            raise ConfigError(f"{cls.at}.{cls.selector} is {name!r}, whose Config must be a subclass of {cls.__name__}")
        return config

    @classmethod
    def chosen(cls, values: Any) -> type[Section]:
        """Returns the class that reads these values of the section."""
        if isinstance(values, Section):
            return type(values)
        default = cls.model_fields[cls.selector].default if cls.selector else ""
        return cls.member(str(values.get(cls.selector, default) if isinstance(values, Mapping) else default))

    @classmethod
    def _require(cls, name: str) -> None:
        """Refuses a component that isn't there."""
        if name not in cls.names():
            there = f"choose one of {', '.join(cls.names())}, or n" if cls.names() else "n"
            raise ValueError(f"{there}ame the module that registers it with --plugin")

    @field_validator("*", mode="wrap")
    @classmethod
    def _read(cls, value: Any, handler: Callable[[Any], Any], info: ValidationInfo) -> Any:
        """Reads a field as files and overrides give it: lists for tuples, mappings or nothing for sections."""
        field = cls.model_fields[str(info.field_name)]
        declared, many = nested(field)
        if declared is None:
            form = Form(field)
            value = str(value) if form.takes_text and isinstance(value, (Whole, Real)) else plain(value)
            if isinstance(value, LiteralPath) and form.is_path:
                return value  # pydantic would hand it to `expand_path` as plain text
            if isinstance(value, str) and not form.is_path:
                if "${" in value:
                    raise ValueError("interpolations aren't read, write the value itself")
                check_filled(value)
            if info.field_name == cls.selector and isinstance(value, str):
                cls._require(value)
            return handler(tuple(value) if isinstance(value, list) else value)
        if not isinstance(value, (Mapping, NoneType)):
            return handler(value)
        given = dict(value or {})
        if many:
            for name in given:
                declared._require(name)
            given = {name: {} if each is True else each for name, each in given.items() if each is not False}
            fields: dict[str, Any] = {name: (declared.member(name), ...) for name in given}
            return dict(create_model("Several", __base__=Section, **fields).model_validate(given))
        chosen = given.get(declared.selector)
        if isinstance(chosen, str) and chosen not in declared.names():
            return handler({declared.selector: chosen})  # says so, and nothing about the other keys
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        ours = {name: getattr(default, name) for name in default.model_fields_set} if default is not None else {}
        ours = {name: own for name, own in ours.items() if given.get(EXCLUSIVE.get((declared.at, name), "")) is None}
        return declared.chosen(given).model_validate({**ours, **given})

    @model_validator(mode="after")
    def _whole(self) -> Self:
        problems = "\n".join(self._problems())
        if problems:
            raise ValueError(problems)
        return self


def nested(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """Returns the section that a field holds, if any, and whether it holds several by their names."""
    many = typing.get_origin(field.annotation) is dict
    hint = typing.get_args(field.annotation)[1] if many else field.annotation
    if typing.get_origin(hint) is None and isinstance(hint, type) and issubclass(hint, Section):
        return hint, many
    return None, False


def settings(kind: type[Section], values: Any = None, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the dotted names of all settings with their fields, in order; `values` choose among the sections."""
    for name, field in kind.model_fields.items():
        declared, many = nested(field)
        value = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
        if declared is None or many:
            yield f"{prefix}{name}", field
        if declared is not None and many:
            for key, each in value.items() if isinstance(value, Mapping) else ():
                yield from settings(declared.member(key), each, f"{prefix}{name}.{key}.")
        elif declared is not None:
            yield from settings(declared.chosen(value), value, f"{prefix}{name}.")


def explain(kind: type[Section], values: Any, error: ValidationError) -> Iterator[str]:
    """Yields what pydantic found wrong with `values`, a line each, beginning with the dotted name of a setting."""
    at = kind.at.split(".") if kind.at else []
    known = dict(settings(kind, values, "".join(f"{part}." for part in at)))
    for each in error.errors(include_url=False):
        places = list(accumulate([*at, *map(str, each["loc"])], "{}.{}".format))
        key, leaf = places[-1] if places else "", [place for place in places if place in known][-1:]
        said = str(each["ctx"]["error"]) if each["type"] == "value_error" else ""
        if each["type"] in ("extra_forbidden", "invalid_key"):
            names = flat({key: each["input"]})
            yield from (
                _of_another(kind, values, name.split(".")[len(at) :], at) or unknown(name, known) for name in names
            )
        elif leaf:
            value = each["input"] if each["type"] == "literal_error" else _at(values, leaf[0].split(".")[len(at) :])
            form = Form(known[leaf[0]])
            if value is None and form.is_path:
                yield f'{leaf[0]} is null; give a path (in YAML, a lone ~ is null: write "~" or $HOME)'
                continue
            whole = said.startswith(f"{leaf[0]} ")
            yield said if whole else f"{leaf[0]} is {value!r}; {said or form.remedy(each['type'])}"
        elif said:
            yield from (f"{key}.{line}".removeprefix(".") for line in said.splitlines())
        else:
            yield f"{key} is {each['input']!r}; it is a section, set {key}.<name> instead"


def _of_another(kind: type[Section], values: Any, path: list[str], at: list[str]) -> str | None:
    """Returns the complaint about a setting of a component that isn't chosen; None if no component has it."""
    declared, section = kind, path[:-1]
    for name in section:
        inner, many = nested(declared.model_fields[name]) if name in declared.model_fields else (None, False)
        if inner is None or many:
            return None
        declared, values = inner, values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    owners = [name for name in declared.names() if path[-1] in declared.member(name).model_fields]
    if not owners:
        return None
    default = declared.model_fields[declared.selector].default
    chosen = values.get(declared.selector, default) if isinstance(values, Mapping) else default
    key, selector = ".".join([*at, *path]), ".".join([*at, *section, declared.selector])
    choice = " or ".join(f"{selector}={owner}" for owner in owners)
    return f"{key} is a setting of {choice}, but {selector} is {chosen}; remove it, or choose {owners[0]}"


def _at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.values()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, LiteralPath):
        return written_path(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
