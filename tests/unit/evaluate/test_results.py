"""The table of an evaluation, and the protocols behind it on features whose answer is known."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate.linear_probe import ProbeRecipe
from ijepa_scale.evaluate.protocols import PROTOCOLS, Options, Score, Split, check_labels, means, transfer
from ijepa_scale.evaluate.results import Results, published_figures

WIDTH, CLASSES = 8, 4


def split(count: int, seed: int, spread: float) -> Split:
    """Classes `spread` apart in the last WIDTH columns, noise in the others."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    features = generator.normal(size=(count, 4 * WIDTH)).astype(np.float32)
    features[:, -WIDTH : -WIDTH + CLASSES] += spread * np.eye(CLASSES, dtype=np.float32)[labels]
    return Split(features=features, labels=labels)


def options(**changes: object) -> Options:
    fixed = {
        "width": WIDTH,
        "num_classes": CLASSES,
        "device": torch.device("cpu"),
        "recipe": ProbeRecipe(epochs=30),
    }
    return Options(**{**fixed, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_finds_what_the_features_hold_and_nothing_more(name):
    test = split(400, 1, 4.0)
    for score in PROTOCOLS[name](split(400, 0, 4.0), test, options()):
        least = 0.55 if "1-shot" in score.protocol else 0.3 if score.protocol == "linear" else 0.85
        assert score.low <= score.accuracy <= score.high and score.accuracy > least, score
    for score in PROTOCOLS[name](split(400, 2, 0.0), split(400, 3, 0.0), options()):
        assert score.accuracy < 0.4, score  # chance is 0.25


def test_scores_repeat_and_each_image_counts_once():
    train, test = split(203, 0, 2.0), split(101, 1, 2.0)
    first, second = ([s for each in PROTOCOLS.values() for s in each(train, test, options())] for _ in range(2))
    assert first == second
    whole = [score for score in first if "shot" not in score.protocol]
    assert all(abs(score.accuracy * 101 - round(score.accuracy * 101)) < 1e-9 for score in whole)


def test_the_seed_chooses_the_draws():
    train, test = split(80, 0, 1.0), split(200, 1, 1.0)
    first, second = (PROTOCOLS["lowshot"](train, test, options(seed=seed, shots=(1,))) for seed in (0, 7))
    assert first != second


def test_what_is_left_out_is_said(caplog):
    scores = PROTOCOLS["lowshot"](split(24, 0, 1.0), split(8, 1, 1.0), options(shots=(1, 10)))
    assert [score.protocol for score in scores] == ["1-shot"]
    assert "10-shot is left out: the smallest class has 6 training images" in caplog.text


def test_transfer_has_one_row_per_way_and_the_mean_over_sets():
    one = transfer(split(400, 0, 4.0), split(101, 1, 4.0), options(shots=(1, 10)))
    other = transfer(split(20, 0, 0.5), split(53, 1, 0.5), options(shots=(1, 10)))
    assert [score.protocol for score in one] == ["knn", "logistic", "1-shot", "10-shot"]
    assert [score.protocol for score in other] == ["knn", "logistic", "1-shot"]  # 5 images a class
    mean = means("all", [one, other])
    assert [score.protocol for score in mean] == ["all: knn", "all: logistic", "all: 1-shot"]
    for score, first, second in zip(mean, one, other, strict=False):
        assert score.accuracy == pytest.approx((first.accuracy + second.accuracy) / 2)
        assert {score.low, score.high} == {first.accuracy, second.accuracy}


def test_too_few_images_for_the_shots_are_refused():
    with pytest.raises(DataError, match="the smallest class has 2 training images, fewer than 5 shots; give --shots 2"):
        PROTOCOLS["lowshot"](split(8, 0, 1.0), split(8, 1, 1.0), options(shots=(5, 10)))


def test_the_table_is_written_as_text_json_markdown_and_picture(tmp_path):
    scores = [
        Score(protocol="knn", setting="k 20, temperature 0.07", accuracy=0.5, low=0.4, high=0.6),
        Score(protocol="linear", setting="last, lr 0.05, wd 0", accuracy=0.7931, low=0.79, high=0.8, note="a | b"),
    ]
    untrained = [Score(protocol="knn", setting="k 20, temperature 0.07", accuracy=0.1, low=0.0, high=0.2)]
    results = Results(facts={"train": "x"}, scores=scores, untrained=untrained, published={"linear": 79.3})
    lines = results.text().splitlines()
    assert lines[0].split()[:2] == ["protocol", "accuracy"] and "10.00%" in lines[2] and "79.3%" in lines[3]
    for path in results.write(tmp_path):
        assert path.stat().st_size > 100
    assert json.loads((tmp_path / "evaluation.json").read_text())["scores"][1]["accuracy"] == 0.7931
    assert "a \\| b" in (tmp_path / "evaluation.md").read_text()


@pytest.mark.parametrize("name", ["a|b", "a\nb", "x$\\frac$", "\udcff", "\u2028"])
def test_any_names_fit_into_the_table(tmp_path, name):
    score = Score(protocol=name, setting=name, accuracy=0.5, low=0.4, high=0.6)
    results = Results(facts={"train": name}, scores=[score], untrained=[score], published={})
    json_file, markdown, picture = results.write(tmp_path)
    lines = markdown.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 6 and lines[2].replace("\\|", "").count("|") == 8
    assert json.loads(json_file.read_text())["facts"]["train"] == name and picture.stat().st_size > 100
    assert {path.name for path in tmp_path.iterdir()} == {json_file.name, markdown.name, picture.name}


@pytest.mark.parametrize("draw", [0.1, 0.7, 1.0])
def test_a_mean_of_equal_draws_is_drawn(tmp_path, draw):
    """Rounding puts the mean of three times 0.1 above its highest draw."""
    mean = (draw + draw + draw) / 3
    scores = [Score(protocol=f"{bound}-shot", setting="", accuracy=mean, low=draw, high=draw) for bound in (1, 5)]
    results = Results(facts={}, scores=scores, untrained=scores, published={})
    assert results.write(tmp_path)[2].stat().st_size > 100


def test_a_table_that_cant_be_written_leaves_none(tmp_path):
    (tmp_path / "evaluation.md").mkdir()
    results = Results(facts={}, scores=split_scores(), untrained=[], published={})
    with pytest.raises(ConfigError, match=r"the table in \S+ can't be written \(Is a directory\); .* are kept"):
        results.write(tmp_path)
    assert not (tmp_path / "evaluation.json").exists()


def split_scores() -> list[Score]:
    return PROTOCOLS["knn"](split(40, 0, 1.0), split(8, 1, 1.0), options())


@pytest.mark.parametrize("protocol", ["1% low-shot", "1% low-shot, finetuned"])
def test_the_published_low_shot_figure_stands_next_to_finetuning_too(protocol):
    score = Score(protocol=protocol, setting="", accuracy=0.5, low=0.4, high=0.6)
    results = Results(facts={}, scores=[score], untrained=[], published={"1% low-shot": 73.3})
    assert results.rows()[0][4] == "73.3%"


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(1, 6), max_size=3))
def test_labels_are_refused_early_where_protocols_would_refuse_them(labels, shots):
    counts = [labels.count(label) for label in set(labels)]
    said = None
    if len(counts) < 2:
        said = f"^flowers: {len(labels)} training images of one class; give two classes or more$"
    elif shots and min(counts) < min(shots):
        said = (
            f"^flowers: the smallest class has {min(counts)} training images, fewer than {min(shots)} shots; give "
            f"--shots {min(counts)}$"
        )
    with pytest.raises(DataError, match=said) if said else contextlib.nullcontext():
        check_labels(np.array(labels), tuple(shots), "flowers")


def test_published_figures_stand_next_to_imagenet_only():
    imagenet = {"num_classes": 1000, "num_test": 50_000}
    assert published_figures("vit_huge", 14, (224, 224), **imagenet)["linear"] == 79.3
    assert published_figures("vit_huge", 16, (224, 224), **imagenet) == {}
    assert published_figures("vit_huge", 14, (224, 224), num_classes=10, num_test=50_000) == {}
