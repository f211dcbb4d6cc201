"""Class names of any bytes in tables, pictures and messages."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from ijepa_scale.data.class_names import shortened, written
from ijepa_scale.evaluate.classification import Accuracy
from ijepa_scale.evaluate.classifier_report import class_names, write_report
from ijepa_scale.metrics.classifier_plots import draw_labelled, label_text

NAMES = [
    "$10_$20 bill", "c$^{$", r"\frac{$", "a_b^c", os.fsdecode(b"caf\xe9"), "two\nlines", "a\ttab", "a,b;\"c'", "a/b\\c",
    "\u05e9\u05dc\u05d5\u05dd", "\u202eesrever", "\x1b[31mred", "\u2028", "x" * 300, "", " ", "\u0085",
    "猫", "🐈", "%s {0}", "=1+1",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain name", "plain name"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("a\\b", r"a\\b"),
        ("\x1b\x00\u0085", r"\u001b\u0000\u0085"),
        ("\u202ea\u2028", r"\u202ea\u2028"),
        ("\ud800", r"\ud800"),
        ("שלום 猫 🐈 é", "שלום 猫 🐈 é"),
    ],
)
def test_names_are_written_in_one_line(name: str, text: str) -> None:
    assert written(name) == text


@settings(max_examples=200, deadline=None)
@given(
    names=st.sets(st.binary(max_size=6).map(os.fsdecode) | st.text("\\ux0e9\n\u0085\udce9", max_size=4), max_size=20)
)
def test_different_names_stay_different_and_are_utf8(names: set[str]) -> None:
    texts = {written(name) for name in names}
    assert len(texts) == len(names)
    for text in texts:
        assert text.encode("utf-8").decode("utf-8") == text and len(text.splitlines()) <= 1


def test_long_names_are_shortened() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("a" * 20 + "b" * 20, 12) == "aaaaaaaa…bbb" and len(shortened("\n" * 40)) == 28


@pytest.mark.filterwarnings("ignore:Glyph")
def test_reports_take_names_of_any_bytes(tmp_path: Path) -> None:
    count = len(NAMES)
    labels = np.arange(count)
    accuracy = Accuracy(top1=0.0, top5=1.0, loss=0.5, labels=labels, predictions=(labels + 1) % count)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "lr": 0.1}))
    write_report(tmp_path, accuracy, 9, count, NAMES)
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [written(name) for name in NAMES]
    assert [row["most often taken for"] for row in rows] == [written(name) for name in [*NAMES[1:], NAMES[0]]]
    path = draw_labelled(torch.zeros(count, 3, 8, 8), torch.eye(count), NAMES, tmp_path / "b.png")
    assert path.stat().st_size > 1000 and (tmp_path / "confusion.png").stat().st_size > 1000


def test_dollars_are_drawn_as_they_are(monkeypatch) -> None:  # noqa: ANN001
    drawn: list[Figure] = []
    save = "ijepa_scale.metrics.classifier_plots.save_figure"
    monkeypatch.setattr(save, lambda figure, path: drawn.append(figure) or path)
    draw_labelled(torch.zeros(1, 3, 8, 8), torch.eye(1), ["$a$"], Path("x"))
    title = drawn[0].axes[0].title
    assert title.get_text() == "$a$ 100%" and not title.get_parse_math()


def test_messages_and_labels_escape_names() -> None:
    class Source:
        classes = ["a\nb", os.fsdecode(b"\xff"), "c" * 100, "d"]

    with pytest.raises(ValueError, match=r"names 4 classes \(a\\nb, \\xff, c+…c+, \.\.\.\) but"):
        class_names(Source(), 3)  # type: ignore[arg-type]
    assert label_text(torch.tensor([1.0, 0.0]), ["a\nb", "c"]) == r"a\nb 100%"
