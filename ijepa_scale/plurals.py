"""Numbers of things in messages. Strings only."""

from __future__ import annotations


def counted(number: int, noun: str, form: str = "") -> str:
    """Returns a number with its noun, given in the singular, in the form that fits: 1 step, 2 steps, 3 classes.

    `form` is that of the number, such as `,` for thousands.
    """
    if number == 1:
        return f"1 {noun}"
    hisses = noun.endswith(("s", "x", "ch")) and noun != "epoch"
    return f"{number:{form}} {noun}{'es' if hisses else 's'}"
