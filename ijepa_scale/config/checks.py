"""Checks of configuration fields, whose problems are gathered and told together."""

from __future__ import annotations

from typing import Any

from ijepa_scale.errors import ConfigError


def choose(problems: list[str], name: str, value: str, choices: tuple[str, ...]) -> None:
    """Notes a value that is none of the choices."""
    if value not in choices:
        problems.append(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def interval(problems: list[str], name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Returns `value` as an ascending pair within [low, high], noting what is wrong."""
    try:
        first, last = (float(v) for v in value)
    except (TypeError, ValueError):
        problems.append(f"{name} is {value!r}; give two numbers [from, to]")
        return low, high
    if not low <= first <= last <= high:
        problems.append(f"{name} is [{first:g}, {last:g}]; give {low:g} <= from <= to <= {high:g}")
    return first, last


def numbers(problems: list[str], name: str, value: Any, count: int) -> tuple[float, ...]:
    """Returns `value` as `count` numbers (ones where it isn't that), noting what is wrong."""
    try:
        numbers = tuple(float(v) for v in value)
        if len(numbers) != count:
            raise ValueError
    except (TypeError, ValueError):
        problems.append(f"{name} is {value!r}; give {count} numbers")
        return (1.0,) * count
    return numbers


def at_least(problems: list[str], low: float, **values: float | None) -> None:
    """Notes numbers below `low`; None passes."""
    for name, value in values.items():
        if value is not None and not value >= low:
            problems.append(f"{name} is {value}; give at least {low:g}")


def fraction(problems: list[str], **values: float) -> None:
    """Notes numbers outside [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            problems.append(f"{name} is {value}; give a number from 0 to 1")


def raise_problems(section: str, problems: list[str]) -> None:
    """Ends the reading of a configuration where there are problems, naming all of them.

    Raises:
        ConfigError: there are any.
    """
    if problems:
        raise ConfigError("\n".join(f"{section}.{problem}" for problem in problems))
