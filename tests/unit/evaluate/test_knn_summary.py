import json

import pytest

from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.summary import summarize


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_summary_holds_the_ends_and_the_time(tmp_path):
    rows = [
        {"step": 0, "knn": 0.526, "knn_untrained": 0.526},
        {"step": 10, "loss": 0.5, "step_ms": 100.0},
        {"step": 30, "loss": 0.25, "step_ms": 200.0},
        {"step": 30, "knn": 0.665, "knn_untrained": 0.526},
    ]
    write(tmp_path, rows)
    summary = summarize(tmp_path)
    assert (summary.steps, summary.first_loss, summary.last_loss, summary.knn) == (30, 0.5, 0.25, 0.665)
    assert summary.training_s == pytest.approx(10 * 0.1 + 20 * 0.2)
    assert summary.lines() == [
        "loss      0.5000 -> 0.2500 after 30 steps",
        "kNN       52.6% untrained -> 66.5% trained (+13.9 points, held-out images)",
        "training  5 s",
    ]
    write(tmp_path, rows[1:3])
    assert len(summarize(tmp_path).lines()) == 2


def test_a_run_without_a_loss_is_refused(tmp_path):
    with pytest.raises(DataError, match="metrics.jsonl holds 0 rows and no loss; train at least"):
        summarize(tmp_path)
