"""Runs benchmarks one after another in child processes within a time budget, and reports every failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import table

_SKIPPED_TESTS = re.compile(r"^SKIPPED \[(\d+)\] (.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A benchmark to run in a child process."""

    name: str
    command: tuple[str, ...]  # arguments of `python`
    expected_s: float
    limit_s: float
    cannot: str | None = None  # why it can't run here


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of an item."""

    name: str
    status: str  # done | failed | skipped
    reason: str
    seconds: float
    output: str = ""


def run_items(
    items: Sequence[Item],
    budget_s: float,
    *,
    show: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Runs the items and returns their outcomes; an item is limited by its own limit and by the rest of the budget."""
    begin = clock()
    outcomes = []
    for item in items:
        left = budget_s - (clock() - begin)
        if item.cannot is not None:
            outcome = Outcome(name=item.name, status="skipped", reason=item.cannot, seconds=0.0)
        elif left < item.expected_s / 2:
            reason = f"{max(0.0, left):.0f} s of {budget_s:.0f} s left, {item.expected_s:.0f} s expected"
            outcome = Outcome(name=item.name, status="skipped", reason=reason, seconds=0.0)
        else:
            show(f"{item.name}: about {item.expected_s:.0f} s ...")
            outcome = run_item(item, min(item.limit_s, left))
        show(f"{outcome.name}: {outcome.status}{f', {outcome.reason}' if outcome.reason else ''}")
        if outcome.output:
            show(outcome.output)
        outcomes.append(outcome)
    return outcomes


def run_item(item: Item, limit_s: float) -> Outcome:
    """Runs an item in a child process, kills it and its children at the limit, and returns the outcome."""
    begin = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, *item.command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
        status, reason = judge(child.returncode, output)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        status, reason = "failed", f"not done after {limit_s:.0f} s"
    seconds = time.monotonic() - begin
    return Outcome(name=item.name, status=status, reason=reason, seconds=seconds, output=output.strip())


def judge(code: int, output: str) -> tuple[str, str]:
    """Returns status and reason; a child fails if it runs out of memory, exits with an error, or skips tests."""
    lines = [line for line in output.splitlines() if line.strip()]
    if code == 0:
        skipped = _SKIPPED_TESTS.findall(output)
        if not skipped:
            return "done", ""
        count = sum(int(number) for number, _ in skipped)
        return "failed", f"{count} tests skipped: {'; '.join(sorted({where for _, where in skipped}))}"
    if re.search(r"out of memory", output, re.IGNORECASE):
        found = next(line for line in lines if re.search(r"out of memory", line, re.IGNORECASE))
        return "failed", f"out of memory: {found.strip()[:160]}"
    if code < 0:
        return "failed", f"killed by signal {-code}"
    return "failed", f"exit code {code}: {lines[-1].strip()[:200] if lines else 'no output'}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Returns a table of the outcomes."""
    lines = [[each.name, each.status, f"{each.seconds:.0f}", each.reason.replace("|", "/")] for each in outcomes]
    return table(["item", "status", "seconds", "reason"], lines)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Returns 0 if every item is done, else 1."""
    return int(any(each.status != "done" for each in outcomes))


def plan(items: Sequence[Item], budget_s: float) -> str:
    """Returns the table of a dry run: expected seconds and limits of the items."""
    lines = [[item.name, f"{item.expected_s:.0f}", f"{item.limit_s:.0f}", item.cannot or ""] for item in items]
    total = sum(item.expected_s for item in items if item.cannot is None)
    rows: list[list[Any]] = [*lines, ["all", f"{total:.0f}", f"{budget_s:.0f}", ""]]
    return table(["item", "expected seconds", "limit", "can't run here"], rows)
