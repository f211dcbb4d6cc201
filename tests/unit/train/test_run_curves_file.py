"""Every run ends with a picture of its curves."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from ijepa_scale.train.run_curves import draw_curves
from ijepa_scale.visualize import curves

ROWS = {
    "pretraining": [{"step": n, "loss": 1 / n, "target_std": 0.5, "lr": 1e-3, "knn": 0.4} for n in range(1, 9)],
    "finetuning": [{"step": n, "loss": 1 / n, "eval_loss": 2.0, "lr": 1e-3, "top1": 0.5, "top5": 1.0} for n in (1, 2)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_curves_have_a_title_each_that_fits(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    save = curves.save_figure
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: drawn.append(figure) or save(figure, path))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    draw_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 600
    (figure,) = drawn
    plots = [axes for axes in figure.axes if axes.axison]
    titles = [axes.get_title(loc="left") for axes in plots]
    assert len(plots) == len(set(ROWS[kind][0])) - 1 and len(set(titles)) == len(titles)
    figure.draw_without_rendering()
    boxes = [axes._left_title.get_window_extent() for axes in plots]
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_a_run_without_rows_says_why_there_is_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw_curves(tmp_path)
    assert f"{tmp_path / 'curves.png'} can't be drawn: {tmp_path / 'metrics.jsonl'} has no rows" in caplog.text
