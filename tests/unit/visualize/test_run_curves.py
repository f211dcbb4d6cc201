"""Curves of runs and published logs: what is drawn is what the files hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from picture_runs import stays_on_page, write_run

from ijepa_scale.errors import DataError
from ijepa_scale.visualize import curves
from ijepa_scale.visualize.curves import RunRows, draw_runs, read_runs, run_names
from ijepa_scale.visualize.published_logs import read_published_log
from launch import visualize

HEADER = "epoch,itr,loss,mask-A,mask-B,time (ms)"


@given(
    epochs=st.integers(1, 3), steps=st.integers(1, 5), resumed=st.lists(st.integers(0, 14), max_size=2),
    cut=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_published_logs_are_read(tmp_path_factory, epochs, steps, resumed, cut, seed) -> None:
    draw = np.random.default_rng(seed)
    places = [(epoch, itr) for epoch in range(1, epochs + 1) for itr in range(steps)]
    lines, expected = [HEADER], {}
    for start in [0, *(place % len(places) for place in resumed)]:  # a resumed run repeats its header and some steps
        lines += [HEADER] if start else []
        for epoch, itr in places[start:]:
            loss = round(float(draw.random()), 5)
            lines.append(f"{epoch},{itr},{loss:.5f},54.00000,36.00000,900")
            expected[epoch, itr] = loss
    path = tmp_path_factory.mktemp("logs") / "log.csv"
    path.write_text("\n".join(lines) + "\n" + ("1,0,0." if cut else ""))
    rows = read_published_log(path)
    assert [row["step"] for row in rows] == list(range(epochs * steps))
    assert [row["loss"] for row in rows] == [expected[place] for place in places]
    assert {(row["context_tokens"], row["target_tokens"], row["step_ms"]) for row in rows} == {(54.0, 36.0, 900.0)}


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "begins with the columns of an empty file; a published log has epoch, itr, loss, mask-A"),
        ("a,b\n1,2\n", "begins with the columns a, b; a published log has epoch, itr, loss, mask-A, mask-B"),
        (f"{HEADER}\n", "has no rows below its header; name a log with at least one iteration"),
        (f"{HEADER}\n1,0,x,1,1,1\n1,1,1,1,1,1\n", "line 2 is '1,0,x,1,1,1'; expected 6 numbers"),
        (f"{HEADER}\n1,nan,1,1,1,1\n1,1,1,1,1,1\n", "line 2 is '1,nan,1,1,1,1'; expected 6 numbers"),
    ],
)
def test_other_files_are_no_published_logs(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError) as raised:
        read_published_log(tmp_path / "log.csv")
    assert message in str(raised.value)


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join)


@given(st.lists(PATHS, min_size=1, max_size=5, unique=True))
def test_names_tell_runs_apart(paths: list[str]) -> None:
    names = run_names(paths)
    assert all(("/" + path).endswith("/" + name) for path, name in zip(paths, names, strict=True))
    by_suffix = [sum(("/" + path).endswith("/" + name) for path in paths) for name in names]
    for path, count in zip(paths, by_suffix, strict=True):  # unless a path is the end of another
        assert count == 1 or any(other != path and ("/" + other).endswith("/" + path) for other in paths)


def kept_figure(runs: list[RunRows], fields: tuple[str, ...] = ()) -> Figure:
    kept: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "save_figure", lambda figure, path: kept.append(figure))
        draw_runs(runs, Path("unused.png"), fields)
    return kept[0]


def test_each_run_has_its_line_in_each_plot() -> None:
    rows = [{"step": s, "loss": 1.0 / s, "knn": 0.01 * s} for s in (10, 20, 30)]
    first = RunRows(name="first", rows=[{"step": 0, "knn_untrained": 0.05}, *rows])
    second = RunRows(name="_second $x$", rows=[{"step": 5, "loss": 7.0, "strange": 3}])
    figure = kept_figure([first, second])
    loss, knn = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (loss, knn)] == ["Loss", "kNN accuracy, %"]
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[10, 0.1], [20, 0.05], [30, 1 / 30]], [[5, 7.0]]]
    assert knn.lines[0].get_ydata().tolist() == pytest.approx([10, 20, 30])
    assert list(knn.lines[1].get_ydata()) == [5.0, 5.0] and knn.texts[0].get_text() == "untrained"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", r"_second \$x\$"]
    assert stays_on_page(figure)
    assert len(kept_figure([first, second], ("strange",)).axes[0].lines) == 1


@given(st.lists(st.sampled_from([0, 1, None]), max_size=12))
def test_an_alarm_lasts_until_it_is_off(states: list[int | None]) -> None:
    rows = [{"step": step, "alarm": state, "loss": 1.0} for step, state in enumerate(states, start=1)]
    text = "".join("." if state is None else str(state) for state in states)
    begun = [m.start(1) + 1 for m in re.finditer(r"(?:^|0)\.*(1)", text)]
    ended = [next((place + 1 for place in range(start, len(text)) if text[place] == "0"), None) for start in begun]
    assert RunRows(name="run", rows=rows).alarms() == list(zip(begun, ended, strict=True))


def test_alarms_are_marked_at_their_steps() -> None:
    rows = [{"step": step, "loss": 1.0 / step, "alarm": int(step in (2, 3, 6))} for step in range(1, 8)]
    (axes,) = kept_figure([RunRows(name="run", rows=rows)], ("loss",)).axes
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"] == [2, 6]


def test_long_runs_are_averaged() -> None:
    values = np.random.default_rng(0).random(10_000)
    run = RunRows(name="long", rows=[{"step": s, "loss": float(v)} for s, v in enumerate(values)])
    (axes,) = kept_figure([run], ("loss",)).axes
    assert np.allclose(axes.lines[0].get_ydata(), values.reshape(400, 25).mean(1))
    low, high = np.quantile(values.reshape(400, 25), (0.1, 0.9), axis=1)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(low.min()) and band.max() == pytest.approx(high.max())


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F), min_size=1)


@given(st.lists(NAMES, min_size=1, max_size=12))
@settings(max_examples=4, deadline=None)
def test_names_stay_on_the_page(names: list[str]) -> None:
    runs = [RunRows(name=name, rows=[{"step": 1e6 * n, "loss": 1e-7 * n} for n in (1, 2)]) for name in names]
    assert stays_on_page(kept_figure(runs))


def test_the_command_draws_runs_and_logs(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", checkpoint=False)
    (tmp_path / "log.csv").write_text(f"{HEADER}\n1,0,0.5,54,36,900\n1,1,0.4,54,36,900\n")
    to = tmp_path / "curves.png"
    assert visualize.main(["curves", str(run), str(tmp_path / "log.csv"), "--to", str(to)]) == 0 and to.exists()
    assert visualize.main(["curves", str(run), "--fields", "los", "--to", str(to), "--overwrite"]) == 2
    assert "error: field los: unknown; did you mean loss?" in capsys.readouterr().err


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metrics.jsonl has no rows; give a run's folder, its metrics.jsonl or a publ"):
        read_runs([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "note": "x"}) + "\n")
    with pytest.raises(DataError, match="no row has a loss; train at least logging.every steps"):
        draw_runs(read_runs([str(tmp_path)]), tmp_path / "a.png")
