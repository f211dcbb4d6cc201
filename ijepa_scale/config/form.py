"""What a field takes, in words read off its type: for error messages and the reference alike."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from pydantic.fields import FieldInfo

from ijepa_scale.environment import expand_path

_HOST = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?(:\d{1,5})?")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


def kind_of(value: Any) -> str:
    """Returns what kind of value a YAML or JSON file holds, in words."""
    kinds = {NoneType: "nothing", bool: "true or false", dict: "a mapping", list: "a list", str: "text"}
    return kinds.get(type(value), "a number")


class Note(NamedTuple):
    """The unit of a field, and what it takes where its type doesn't say it well."""

    unit: str = ""
    words: str = ""


class Within(NamedTuple):
    """Of a pair of numbers: low <= from <= to <= high."""

    low: float
    high: float

    def __call__(self, pair: tuple[float, float]) -> tuple[float, float]:
        """Returns the pair, or refuses it."""
        if not self.low <= pair[0] <= pair[1] <= self.high:
            raise ValueError(f"give {self.note.words}")
        return pair

    @property
    def note(self) -> Note:
        """What the pair is."""
        return Note(words=f"two numbers [from, to], {self.low:g} <= from <= to <= {self.high:g}")


class Form:
    """A field's type taken apart: alternatives, and what is annotated to them."""

    def __init__(self, field: FieldInfo) -> None:
        parts = list(_apart(field.annotation))
        self.types = [hint for hint, _ in parts if hint is not NoneType]
        self.nullable = len(self.types) < len(parts)
        marks = [*field.metadata, *(mark for _, own in parts for mark in own)]
        marks = [mark.func.note if isinstance(getattr(mark, "func", None), Within) else mark for mark in marks]
        note = next((mark for mark in marks if isinstance(mark, Note)), Note())
        self.unit, self.bounds = note.unit, _bounds(marks)
        self.is_path = expand_path in (getattr(mark, "func", None) for mark in marks)
        self.words = note.words or " or ".join(map(_words, self.types))
        self.choices = [word for hint in self.types for word in _literals(hint)]
        text = any(hint is str or typing.get_origin(hint) is Literal for hint in self.types)
        self.takes_text = text and bool not in self.types  # otherwise a text in YAML's sense: true is no text

    def remedy(self, error: str) -> str:
        """Returns what to do about an error of pydantic's."""
        null = " or null" * self.nullable
        if error == "literal_error":
            if len(self.types) > 1:
                return f"give {self.words}{null}"
            return f"choose {'one of ' * (len(self.choices) > 1)}{', '.join(self.choices)}{',' * self.nullable}{null}"
        if error == "finite_number":
            return "give a finite number"
        if error.startswith(("greater", "less")) and typing.get_origin(self.types[0]) is not tuple:
            return f"give {'' if self.bounds[:2] == 'at' else 'a number '}{self.bounds}{',' * self.nullable}{null}"
        return f"give {self.words}{null}"


def _apart(hint: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields each alternative of a type with what is annotated to it."""
    if typing.get_origin(hint) is Annotated:
        inner, *marks = typing.get_args(hint)
        yield from ((each, (*own, *marks)) for each, own in _apart(inner))
    elif typing.get_origin(hint) in (typing.Union, UnionType):
        yield from (part for each in typing.get_args(hint) for part in _apart(each))
    else:
        yield hint, ()


def _bounds(marks: list[Any]) -> str:
    """Returns the bounds in words, such as "at least 1" or "from 0 to below 1"."""
    at = {type(m): f"{getattr(m, type(m).__name__.lower()):g}" for m in marks if isinstance(m, (Ge, Gt, Le, Lt))}
    low = f"above {at[Gt]}" if Gt in at else f"at least {at[Ge]}" if Ge in at else ""
    high = f"below {at[Lt]}" if Lt in at else f"at most {at[Le]}" if Le in at else ""
    if Ge in at and high:
        return f"from {at[Ge]} to {high.removeprefix('at most ')}"
    return " and ".join(filter(None, (low, high)))


def _words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"{'one of ' * (len(args) > 1)}{', '.join(args)}"
    if origin is not tuple:
        return _WORDS[origin or hint]
    if args[-1] is Ellipsis:
        return f"a list of {', '.join(_literals(hint)) or 'texts'}"
    bounds = _bounds([mark for _, marks in _apart(args[0]) for mark in marks])
    return f"{len(args)} numbers{f', each {bounds}' if bounds else ''}"


def _literals(hint: Any) -> Iterator[str]:
    for each in (hint, *typing.get_args(hint)):
        yield from typing.get_args(each) if typing.get_origin(each) is Literal else ()


def _square(size: Any) -> Any:
    return (size, size) if isinstance(size, int) and not isinstance(size, bool) else size


def member_suffix(text: str) -> str:
    """Returns a suffix of tar members, like jpg or coarse.cls, in lower case and without a dot in front.

    Raises:
        ValueError: it is no suffix.
    """
    suffix = text.strip().lower().removeprefix(".")
    if not re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", suffix):
        raise ValueError(
            f"{text!r} isn't a suffix of a member; give what follows the first dot, like jpg or coarse.cls"
        )
    return suffix


def _names(given: Any) -> Any:
    return () if given is None else (given,) if isinstance(given, str) else given


def _hosts(given: tuple[str, ...]) -> tuple[str, ...]:
    for host in given:
        if not _HOST.fullmatch(host):
            raise ValueError(f"{host!r} isn't a server; give names without https:// and paths, like cdn.example.org")
    return tuple(host.lower() for host in given)


PathText = Annotated[str, AfterValidator(expand_path), Note("path")]
AtLeast0 = Annotated[float, Ge(0.0)]
Positive = Annotated[float, Gt(0.0)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Count = Annotated[int, Ge(1)]
Images = Annotated[int, Ge(1), Note("images")]
Pixels = Annotated[int, Ge(1), Note("pixels")]
Steps = Annotated[int, Note("steps")]
Epochs = Annotated[float, Note("epochs")]
Seconds = Annotated[float, Ge(0.0), Note("seconds")]
Gibibytes = Annotated[float, Gt(0.0), Note("GiB")]
Pair = tuple[float, float]
Betas = tuple[Annotated[float, Ge(0.0), Lt(1.0)], Annotated[float, Ge(0.0), Lt(1.0)]]
Shares = Annotated[Pair, AfterValidator(Within(0.0, 1.0))]
Aspects = Annotated[Pair, AfterValidator(Within(1e-3, 1e3))]
CropScale = Annotated[Pair, AfterValidator(Within(1e-4, 1.0))]
CropRatio = Annotated[Pair, AfterValidator(Within(1e-2, 1e2))]
Interpolation = Literal["bilinear", "bicubic"]
Hosts = Annotated[
    tuple[str, ...],
    BeforeValidator(_names),
    AfterValidator(_hosts),
    Note("", "a list of servers, like cdn.example.org"),
]
Member = Annotated[str, AfterValidator(member_suffix)]
Positions = Literal["interpolated", "computed"]
Exif = Literal["ignore", "apply"]
DecodeScaling = Literal["none", "dct"]
PixelType = Literal["uint8", "uint16", "float32"]
Means = Annotated[tuple[float, ...], Note("", "a number for each channel")]
Deviations = Annotated[tuple[Positive, ...], Note("", "a number above 0 for each channel")]
AdamWCode = Literal["auto", "torch", "apex", "deepspeed", "fused_tail"]
Switch = Annotated[Literal["auto"] | bool, Note("", "auto, true or false")]
Kernels = Annotated[tuple[Literal["target_loss", "target_update"], ...], BeforeValidator(_names)]
ImageSize = Annotated[
    tuple[int, int], BeforeValidator(_square), Note("pixels", "one number, or [height, width]"),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}),
]  # fmt: skip
