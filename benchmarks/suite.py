"""Runs benchmarks one after another in child processes within a time budget, and reports all that didn't run.

A part that can't run for one of the `EXPECTED_SKIPS` is listed as skipped, with its reason, and the suite still passes.
Anything else that didn't run makes it fail.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import SKIPPED, table

EXPECTED_SKIPS = (  # reasons that say nothing about our code: what the machine lacks, and what the package refuses
    r"NVIDIA's apex with its CUDA extensions isn't installed",
    r"attention fa[34] (isn't in torch|can't be activated)",
    r"DeepSpeed isn't installed",
    r"target_precision is fp8 but .*sharded weights are gathered in bf16",
    r"fp8 products need (\d+\.\d+ or higher|a CUDA device)",
)
KILLED_S = 30.0  # until a child that was killed, and all that hold its output, must have ended
_SKIP = re.compile(rf"^{SKIPPED} (.+?): (.+)$", re.MULTILINE)


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
    skips: tuple[tuple[str, str], ...] = ()  # parts that can't run here, and why


def run_items(
    items: Sequence[Item],
    budget_s: float,
    *,
    show: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Runs the items and yields each outcome; an item is limited by its own limit and by the rest of the budget."""
    begin = clock()
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
        yield outcome


def run_item(item: Item, limit_s: float) -> Outcome:
    """Runs an item in a child process, kills it and its children at the limit, and returns the outcome."""
    begin = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-u", *item.command],  # unbuffered, so that a killed child's output isn't lost
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        output, ended = _killed(child)
        status, reason = "failed", f"not done after {limit_s:.0f} s{ended}"
    except BaseException:  # such as Ctrl-C: no child outlives the suite
        if child.returncode is None:  # else its number may be that of others
            os.killpg(child.pid, signal.SIGKILL)
        raise
    else:
        status, reason = judge(child.returncode, output)
    seconds, skips = time.monotonic() - begin, tuple(_SKIP.findall(output))
    return Outcome(name=item.name, status=status, reason=reason, seconds=seconds, output=output.strip(), skips=skips)


def _killed(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Kills a child and its children; returns its output, and what is to be said if it doesn't end even so."""
    os.killpg(child.pid, signal.SIGKILL)
    try:
        return child.communicate(timeout=KILLED_S)[0], ""
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return text, f", and process {child.pid} or one of its hasn't ended {KILLED_S:.0f} s after it was killed"


def expected(reason: str) -> bool:
    """Returns whether a part may be skipped for this reason."""
    return any(re.search(pattern, reason) for pattern in EXPECTED_SKIPS)


def judge(code: int, output: str) -> tuple[str, str]:
    """Returns status and reason.

    A child fails if it runs out of memory, exits with an error, or skips a part for a reason that isn't expected.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    if code == 0:
        skipped = [f"{what}: {reason}" for what, reason in _SKIP.findall(output) if not expected(reason)]
        return ("failed", f"skipped {'; '.join(skipped)}") if skipped else ("done", "")
    if re.search(r"out of memory", output, re.IGNORECASE):
        found = next(line for line in lines if re.search(r"out of memory", line, re.IGNORECASE))
        return "failed", f"out of memory: {found.strip()[:160]}"
    if code < 0:
        return "failed", f"killed by signal {-code}"
    return "failed", f"exit code {code}: {lines[-1].strip()[:200] if lines else 'no output'}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Returns a table of the outcomes and of the parts that were skipped."""
    lines = []
    for each in outcomes:
        lines.append([each.name, each.status, f"{each.seconds:.0f}", each.reason])
        lines += [[f"{each.name}: {what}", "skipped", "", reason] for what, reason in each.skips]
    return table(["item", "status", "seconds", "reason"], [[cell.replace("|", "/") for cell in line] for line in lines])


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Returns 0 if every item is done or was skipped for an expected reason, else 1."""
    return int(
        not all(each.status == "done" or (each.status == "skipped" and expected(each.reason)) for each in outcomes)
    )


def plan(items: Sequence[Item], budget_s: float) -> str:
    """Returns the table of a dry run: expected seconds and limits of the items."""
    lines = [[item.name, f"{item.expected_s:.0f}", f"{item.limit_s:.0f}", item.cannot or ""] for item in items]
    total = sum(item.expected_s for item in items if item.cannot is None)
    rows: list[list[Any]] = [*lines, ["all", f"{total:.0f}", f"{budget_s:.0f}", ""]]
    return table(["item", "expected seconds", "limit", "can't run here"], rows)
