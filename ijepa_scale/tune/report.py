"""Formats the results of a search for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ijepa_scale.plurals import counted
from ijepa_scale.tune.loader_workers import HEADROOM, Workers
from ijepa_scale.tune.ranking import Measurement, ranked
from ijepa_scale.tune.search import Found
from ijepa_scale.tune.space import Space

_HEAD = (
    f"{'':>4}{'images/s':>10}{'20 to 80%':>16}{'step ms':>10}{'GB':>8}{'GB worst':>10}{'MFU':>7}{'data wait':>11}"
    "  setting"
)


def head_text(space: Space) -> str:
    """Returns a description of what is tuned, to print before the first measurement."""
    config, worst = space.config, space.worst
    patches = config.model.grid[0] * config.model.grid[1]
    return "\n".join(
        (
            f"machine    {space.machine.text()}",
            f"batch      {counted(space.batch_size, 'image')}, {space.share} of each process, as configured",
            f"strategy   {space.engine.strategy}: {space.reason}",
            f"worst step contexts of {worst.context} and targets of {worst.target} of {patches} patches, all at once",
        )
    )


def found_text(space: Space, found: Found, best: Measurement | None, wait: Mapping[str, float]) -> str:
    """Returns the ranked table and the lists of what failed or was left out. `wait` is the data wait in ms by label."""
    lines: list[str] = []
    if found.measured:
        lines += _table(space, found, best, wait)
    for title, reasons in (("failed", found.failed), ("left out", found.left_out)):
        lines += ["", f"{title}:", *(f"  {label}: {reason}" for label, reason in reasons.items())] if reasons else []
    return "\n".join(lines)


def _table(space: Space, found: Found, best: Measurement | None, wait: Mapping[str, float]) -> Iterator[str]:
    yield _HEAD
    for rank, each in enumerate(ranked(list(found.measured.values())), start=1):
        low, middle, high = each.rates
        mfu = each.mfu(space.machine.peak_flops)
        label = each.candidate.label
        yield (
            f"{rank:>3} {middle:>10.1f}{f'{low:.1f} to {high:.1f}':>16}{each.step_ms:>10.1f}"
            f"{each.peak_bytes / 1e9:>8.2f}{each.worst_bytes / 1e9:>10.2f}{'-' if mfu is None else f'{mfu:.1%}':>7}"
            f"{f'{wait[label]:.1f} ms' if label in wait else '-':>11}  {label}" + (" <- winner" if each is best else "")
        )
    yield "Medians over steps with the same masks; GB are one process's peak over drawn masks and in the worst step."
    yield "A candidate is faster only where four of five steps are; others are ties, and of ties the simplest wins:"
    yield "less checkpointing, then not compiled, less sharding, attention as configured, fewer micro-batches."


def workers_text(workers: Workers) -> str:
    """Returns the rates of the loaders of all processes together, and the chosen number of workers."""
    if workers.chosen is None:
        return f"workers not measured: {workers.reason}"
    lines = [f"workers (the step needs {workers.need:.1f} images/s, {HEADROOM:g} times that counts as enough):"]
    for count, rate in workers.rates.items():
        mark = " <- chosen" if count == workers.chosen else ""
        lines.append(f"  {count:>3} per process: {rate:.1f} images/s{mark}")
    lines += [f"  {count:>3} per process: {reason}" for count, reason in workers.failed.items()]
    if not workers.keeps_up:
        lines.append("  none is enough: the step will wait for data; store smaller images or use more cores")
    return "\n".join(lines)
