"""Engines are compared round by round, on work that must be the same."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import engine_ratio
from benchmarks.common import read_rows

ROOT = Path(__file__).parents[3]
OPTIONS = argparse.Namespace(
    rounds=3, steps=2, processes=2, batch=4, device="cpu", engines=list(engine_ratio.ENGINES)[1:], overrides=[]
)


def test_ratios_pair_the_rounds_and_skip_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    slower = {name: 1.0 + index for index, name in enumerate(engine_ratio.ENGINES)}

    def measure(name: str, _: argparse.Namespace) -> dict[str, float]:
        turn = len(calls) // len(slower)
        calls.append(name)
        noise = 100.0 if turn == 0 else 1.0 + turn  # the machine gets slower, for all alike
        return {"wall_s": 0.01 * slower[name] * noise, "cpu_s": 0.02 * slower[name] * noise, "loss": 0.4}

    monkeypatch.setattr(engine_ratio, "measure", measure)
    rows = engine_ratio.compare(OPTIONS)
    assert calls[: len(slower)] == calls[-len(slower) :][::-1] == list(slower) and len(calls) == 4 * len(slower)
    for row in rows:
        for clock in ("wall_speed", "cpu_speed"):
            assert list(row[clock].values()) == pytest.approx([1 / slower[row["engine"]]] * 3)
    assert rows[0]["wall_ms"] == pytest.approx(30.0) and rows[0]["cpu_ms"] == pytest.approx(60.0)
    assert f"| {rows[1]['engine']} | 60.0 | 0.50 - 0.50 - 0.50 | 120.0 | 0.50 - 0.50 - 0.50 | 0e+00 |" in (
        engine_ratio.report(rows)
    )


def test_engines_with_other_losses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(name: str, _: argparse.Namespace) -> dict[str, float]:
        return {"wall_s": 1.0, "cpu_s": 1.0, "loss": 0.41 if name == "zero3" else 0.4}

    monkeypatch.setattr(engine_ratio, "measure", measure)
    with pytest.raises(ValueError, match=r"the losses of zero3 and ddp differ by 1.0e-02: they don't do the same work"):
        engine_ratio.compare(OPTIONS)


def test_the_page_has_the_figures_of_the_rows() -> None:
    rows = read_rows(ROOT / "benchmarks" / "results" / "engine_ratio-2026-11-26-cpu.jsonl")
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert {row["engine"] for row in rows} == set(engine_ratio.ENGINES)
    for row in rows:
        for clock in ("cpu_speed", "wall_speed"):
            cell = " - ".join(f"{value:.2f}" for value in row[clock].values())
            assert row["engine"] == "ddp" or cell in page, (row["engine"], cell)
