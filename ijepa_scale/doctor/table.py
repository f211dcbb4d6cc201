"""The findings of all processes as a table for people and as JSON for machines."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from ijepa_scale.doctor.finding import Finding

WIDTH = 110
PROCESS = "process "  # begins a place that is no host
_MOST_LINES = 4  # of one check with one verdict; the others are counted


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings in the order of their checks, equal ones of several places as one."""
    places: dict[tuple[str, str, str, str], list[Finding]] = {}
    for each in findings:
        places.setdefault((each.check, each.found, each.verdict, each.remedy), []).append(each)
    order = {check: index for index, check in enumerate(dict.fromkeys(key[0] for key in places))}
    found = []
    for equal in sorted(places.values(), key=lambda equal: order[equal[0].check]):
        names = list(dict.fromkeys(each.where for each in equal if each.where))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        found.append(replace(equal[0], where=", ".join(names[:3]) + more))
    return found


def wrong_of(findings: Iterable[Finding]) -> list[Finding]:
    """Returns those that are wrong, equal ones once."""
    return [each for each in merged(findings) if each.verdict == "wrong"]


def table(findings: Sequence[Finding]) -> str:
    """Returns a line for each check, what is wrong, and the remedies. Names hosts where there are several."""
    hosts = {each.where for each in findings if each.where and not each.where.startswith(PROCESS)}
    lines, shown, left = [], Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    known = merged(findings)
    width = max((len(each.check) for each in known), default=0) + 2
    for each in known:
        key = (each.check, each.verdict)
        if each.verdict != "wrong" and shown[key] >= _MOST_LINES:
            left[key] += 1
            continue
        shown[key] += 1
        told = each.where and (len(hosts) > 1 or each.where.startswith(PROCESS))
        place = f"{each.where}: " if told else ""
        text = f"{each.verdict:<13}{each.check:<{width}}{place}{each.found}"
        lines.append(textwrap.fill(text, WIDTH, subsequent_indent=" " * (13 + width), break_long_words=False))
    for (check, verdict), count in left.items():
        lines.append(f"{verdict:<13}{check:<{width}}{count} more places, see --json")
    wrong = wrong_of(findings)
    lines.append("")
    if not wrong:
        lines.append("nothing is wrong")
    for each in wrong:
        remedy = f"{each.check}: {each.remedy}"
        lines.append(textwrap.fill(f"remedy       {remedy}", WIDTH, subsequent_indent=" " * 13, break_long_words=False))
    return "\n".join(lines)


def table_json(findings: Sequence[Finding], about: dict[str, Any]) -> dict[str, Any]:
    """Returns all findings as plain values, those of each place, with `about`."""
    return {**about, "wrong": len(wrong_of(findings)), "findings": [asdict(each) for each in findings]}


__all__ = ["PROCESS", "merged", "table", "table_json", "wrong_of"]
