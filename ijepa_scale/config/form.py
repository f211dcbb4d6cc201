"""What a field takes, in words read off its type: for error messages and the reference alike."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from pydantic.fields import FieldInfo

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


class Unit(NamedTuple):
    """What a number counts or is measured in."""

    unit: str


class Words(NamedTuple):
    """What a field takes, where its type doesn't say it well."""

    words: str


class Within(NamedTuple):
    """Of a pair of numbers: low <= from <= to <= high."""

    low: float
    high: float

    def __call__(self, pair: tuple[float, float]) -> tuple[float, float]:
        """Returns the pair, or refuses it."""
        if not self.low <= pair[0] <= pair[1] <= self.high:
            raise ValueError(f"give {self.words}")
        return pair

    @property
    def words(self) -> str:
        """What the pair is."""
        return f"two numbers [from, to], {self.low:g} <= from <= to <= {self.high:g}"


class Form:
    """A field's type taken apart: alternatives, and what is annotated to them."""

    def __init__(self, field: FieldInfo) -> None:
        parts = list(_apart(field.annotation))
        self.types = [hint for hint, _ in parts if hint is not NoneType]
        self.nullable = len(self.types) < len(parts)
        notes = [*field.metadata, *(note for _, own in parts for note in own)]
        self.notes = [getattr(note, "func", note) for note in notes]
        self.unit = next((note.unit for note in self.notes if isinstance(note, Unit)), "")
        self.bounds = _bounds(self.notes)
        said = [note.words for note in self.notes if isinstance(note, (Words, Within))]
        self.words = said[0] if said else " or ".join(map(_words, self.types))
        self.takes_text = any(hint is str or typing.get_origin(hint) is Literal for hint in self.types)
        self.choices = [str(word) for hint in self.types for word in _literals(hint)]

    def remedy(self, error: str) -> str:
        """Returns what to do about an error of pydantic's."""
        if error == "literal_error":
            return (
                f"choose {'one of ' if self.choices[1:] else ''}{', '.join(self.choices)}{', or null' * self.nullable}"
            )
        if error == "finite_number":
            return "give a finite number"
        if error.startswith(("greater", "less")) and typing.get_origin(self.types[0]) is not tuple:
            bounds = self.bounds if self.bounds.startswith("at least") else f"a number {self.bounds}"
            return f"give {bounds}{', or null' * self.nullable}"
        return f"give {self.words}{' or null' * self.nullable}"


def _apart(hint: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields each alternative of a type with what is annotated to it."""
    if typing.get_origin(hint) is Annotated:
        inner, *notes = typing.get_args(hint)
        yield from ((each, (*own, *notes)) for each, own in _apart(inner))
    elif typing.get_origin(hint) in (typing.Union, UnionType):
        yield from (part for each in typing.get_args(hint) for part in _apart(each))
    else:
        yield hint, ()


def _bounds(notes: list[Any]) -> str:
    """Returns the bounds in words, such as "at least 1" or "from 0 to below 1"."""
    marks = {type(n): f"{getattr(n, type(n).__name__.lower()):g}" for n in notes if isinstance(n, (Ge, Gt, Le, Lt))}
    low = f"above {marks[Gt]}" if Gt in marks else f"at least {marks[Ge]}" if Ge in marks else ""
    high = f"below {marks[Lt]}" if Lt in marks else f"at most {marks[Le]}" if Le in marks else ""
    if Ge in marks and high:
        return f"from {marks[Ge]} to {high.removeprefix('at most ')}"
    return " and ".join(filter(None, (low, high)))


def _words(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"{'one of ' if args[1:] else ''}{', '.join(args)}"
    if origin is tuple and args[-1] is Ellipsis:
        return f"a list of {', '.join(typing.get_args(args[0]))}"
    if origin is tuple:
        bounds = _bounds([note for _, notes in _apart(args[0]) for note in notes])
        return f"{len(args)} numbers{f', each {bounds}' if bounds else ''}"
    return _WORDS[origin or hint]


def _literals(hint: Any) -> Iterator[str]:
    for each in (hint, *typing.get_args(hint)):
        yield from typing.get_args(each) if typing.get_origin(each) is Literal else ()


def _square(size: Any) -> Any:
    return (size, size) if isinstance(size, int) and not isinstance(size, bool) else size


def _names(names: Any) -> Any:
    return () if names is None else (names,) if isinstance(names, str) else names


AtLeast0 = Annotated[float, Ge(0.0)]
Positive = Annotated[float, Gt(0.0)]
Fraction = Annotated[float, Ge(0.0), Le(1.0)]
Count = Annotated[int, Ge(1)]
Images = Annotated[int, Ge(1), Unit("images")]
Steps = Annotated[int, Unit("steps")]
Epochs = Annotated[float, Unit("epochs")]
Pixels = Annotated[int, Ge(1), Unit("pixels")]
Shares = Annotated[tuple[float, float], AfterValidator(Within(0.0, 1.0))]
CropScale = Annotated[tuple[float, float], AfterValidator(Within(1e-4, 1.0))]
Betas = tuple[Annotated[float, Ge(0.0), Lt(1.0)], Annotated[float, Ge(0.0), Lt(1.0)]]
Colors = tuple[float, float, float]
Spreads = tuple[Positive, Positive, Positive]
# An int is both sides of a square; a name is a list of one.
ImageSize = Annotated[
    tuple[int, int], BeforeValidator(_square), Words("pixels, or [height, width]"), Unit("pixels"),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}),
]  # fmt: skip
Interpolation = Literal["bilinear", "bicubic"]
AdamWImplementation = Literal["auto", "torch", "apex", "deepspeed"]
Kernels = Annotated[tuple[Literal["target_loss", "target_update"], ...], BeforeValidator(_names)]
