"""The known name that a mistyped one was probably meant to be. Strings only."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def nearest(name: str, known: Collection[str]) -> str | None:
    """Returns the most similar of `known`, or None where nothing is similar.

    An abbreviation counts as similar: `learning_rate` finds `lr`, and `wd` finds `weight_decay`.
    """
    by_lower = {candidate.lower(): candidate for candidate in reversed(list(known))}
    lower = name.lower()
    if lower in by_lower:
        return by_lower[lower]
    for candidate in by_lower:
        if _initials(lower) == candidate or _initials(candidate) == lower:
            return by_lower[candidate]
    match = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.6)
    return by_lower[match[0]] if match else None


def nearest_dotted(key: str, known: Collection[str]) -> str | None:
    """Returns the known dotted key nearest to `key`, or None.

    A name that stands in another section wins, then a similar one in its own section, then anywhere.
    """
    section, _, leaf = key.rpartition(".")
    by_leaf = {each.rpartition(".")[2]: each for each in reversed(list(known))}
    own = nearest(section, {each.rpartition(".")[0] for each in known if "." in each}) if section else None
    siblings = {each.rpartition(".")[2]: each for each in known if own and each.rpartition(".")[0] == own}
    if leaf in siblings or leaf in by_leaf:
        return siblings.get(leaf) or by_leaf[leaf]
    return next((names[near] for names in (siblings, by_leaf) if (near := nearest(leaf, names))), None)


def unknown(key: str, known: Collection[str]) -> str:
    """Returns the complaint about an unknown dotted key, with the known one that was probably meant."""
    sections = {each.rpartition(".")[0] for each in known} - {""}
    near = nearest_dotted(key, known) if "." in key else nearest(key, sections) or nearest_dotted(key, known)
    if near:
        return f"{key}: unknown; did you mean {near}?"
    siblings = [each for each in known if each.rpartition(".")[0] == key.rpartition(".")[0]]
    return f"{key}: unknown; there are {', '.join(siblings or sorted({each.partition('.')[0] for each in known}))}"


def _initials(name: str) -> str | None:
    """Returns the first letters of a name of several words, or None."""
    words = [word for word in name.split("_") if word]
    return "".join(word[0] for word in words) if len(words) > 1 else None
