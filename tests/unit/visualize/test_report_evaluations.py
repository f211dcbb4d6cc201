"""The report's tables of evaluations: the same figures as those that launch/evaluate.py and finetuning write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.errors import DataError
from ijepa_scale.evaluate import classifier_report
from ijepa_scale.evaluate.classification import Accuracy
from ijepa_scale.evaluate.dense.dense_protocols import Measure
from ijepa_scale.evaluate.dense.dense_results import DenseResults
from ijepa_scale.evaluate.protocols import Score
from ijepa_scale.evaluate.results import Results
from ijepa_scale.visualize.report_evaluations import read_classes, read_evaluation

SHARES = st.floats(0, 1)
NAMES = st.text(min_size=1, max_size=8)


@st.composite
def measures(draw: st.DrawFn, classes: int) -> list[Measure]:
    found = []
    for protocol in draw(st.lists(st.sampled_from(["segmentation", "patch-knn", "depth"]), min_size=1, unique=True)):
        share = protocol != "depth"
        for of_class in [None, *range(classes if share else 0)]:
            value, low, high = (draw(SHARES) * (1 if share else 80) for _ in range(3))
            found.append(
                Measure(protocol=protocol, measure="figure", value=value, low=low, high=high, share=share,
                        of_class=of_class, setting="lr 1" if of_class is None else "")
            )  # fmt: skip
    return found


@given(st.data(), st.lists(NAMES, min_size=1, max_size=4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_dense_figures_are_those_of_the_command(tmp_path_factory, data, names, named) -> None:
    found, untrained = data.draw(measures(len(names))), data.draw(measures(len(names)))
    results = DenseResults(facts={"seed": 0}, measures=found, untrained=untrained, classes=names if named else None)
    folder = tmp_path_factory.mktemp("dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseResults, "_draw", lambda self, path: path)
        results.write(folder)
    tables = read_evaluation(folder / "evaluation.json").tables
    cells = {}  # (protocol, measure) as the command calls it -> value, untrained
    for table in tables:
        assert table.folded == (table.columns[0] == "class")
        for row in table.rows:
            by_name = dict(zip(table.columns, row, strict=True))
            measure = by_name["measure"] + (f", {by_name['class']}" if "class" in by_name else "")
            cells.setdefault((by_name["protocol"], measure), []).append(
                (by_name["value"], by_name["95% interval"].replace(" to ", " - "), by_name.get("untrained", ""))
            )
    expected: dict = {}
    for protocol, measure, value, interval, reference, *_ in results.rows():
        expected.setdefault((protocol, measure), []).append((value, interval, reference))
    assert cells == expected


@given(st.lists(NAMES.filter(lambda name: name != "all sets"), max_size=3, unique=True), SHARES)
@settings(max_examples=15, deadline=None)
def test_further_data_sets_have_their_own_table(tmp_path_factory, sets: list[str], accuracy: float) -> None:
    def scores(value: float) -> list[Score]:
        names = [*(f"{name}: " for name in sets), *(["all sets: "] if len(sets) > 1 else [])]
        return [
            Score(protocol=f"{name}{protocol}", setting="k 20", accuracy=value, low=0.0, high=1.0)
            for name in ("", *names)
            for protocol in ("knn", "1% low-shot")
        ]

    facts = {"encoder": "runs/a", **{name: "a and b" for name in sets}}
    results = Results(facts=facts, scores=scores(accuracy), untrained=scores(0.125), published={"1% low-shot": 73.3})
    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "_draw", lambda self, path: path)
        results.write(folder)
    own, *further = read_evaluation(folder / "evaluation.json").tables
    figures = [f"{100 * accuracy:.2f}%", "0.00% to 100.00%", "12.50%"]
    assert own.rows == [["knn", *figures, "", "k 20"], ["1% low-shot", *figures, "73.3%", "k 20"]]
    assert len(further) == bool(sets)
    names = [*sets, *(["all sets"] if len(sets) > 1 else [])]
    expected = [[name, protocol, *figures, "k 20"] for name in names for protocol in ("knn", "1% low-shot")]
    assert [row for table in further for row in table.rows] == expected


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=9), NAMES)
@settings(max_examples=8, deadline=None)
def test_classes_of_finetuning_are_shown(tmp_path_factory, images, name) -> None:
    labels, guesses = np.array(images).T
    folder = tmp_path_factory.mktemp("fine")
    accuracy = Accuracy(labels=labels, predictions=guesses, top1=0.5, top5=1.0, loss=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_report, "draw_confusion", lambda *_: None)
        classifier_report.write_report(folder, accuracy, 7, 3, [f"{name}{n}" for n in range(3)])
    found = read_classes(folder)
    assert found is not None and found.facts == {
        "step": 7, "images": len(images), "top1": "50.00%", "top5": "100.00%", "loss": 0.25,
    }  # fmt: skip
    (table,) = found.tables
    assert table.folded and [row[1] for row in table.rows] == [str(int((labels == n).sum())) for n in range(3)]
    for n, row in enumerate(table.rows):
        right, total = int(((labels == n) & (guesses == n)).sum()), int((labels == n).sum())
        assert row[2] == (f"{100 * right / total:.2f}%" if total else "")


def test_other_tables_are_refused(tmp_path: Path) -> None:
    assert read_classes(tmp_path) is None
    (tmp_path / "classes.csv").write_text("class,images\na,1,2\n")
    with pytest.raises(DataError, match="classes.csv isn't a table of classes; copy it again from the run, or leave"):
        read_classes(tmp_path)
    for text in ("{}", '{"measures": 3}', '{"measures": [{"value": 1}]}'):
        (tmp_path / "evaluation.json").write_text(text)
        kind = "measures" if "measures" in text else "scores"
        with pytest.raises(DataError, match=f"evaluation.json holds no {kind} with a protocol; give the evaluation"):
            read_evaluation(tmp_path / "evaluation.json")
