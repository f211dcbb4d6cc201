"""Accuracy over all images, the files of a report, and the messages of errors."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.synthetic import SyntheticSource
from ijepa_scale.engine.world import World
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.classification import Accuracy, ClassifierCheck, check_labels
from ijepa_scale.evaluate.classifier_report import class_names, class_table, write_report
from ijepa_scale.metrics.classifier_plots import label_text
from ijepa_scale.metrics.confusion import Confusion

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
SHADES = (0, 60, 120, 180, 240)  # an image of class c is grey SHADES[c]


@pytest.fixture
def folder(tmp_path):
    for label, shade in enumerate(SHADES):
        (tmp_path / "data" / f"class{label}").mkdir(parents=True)
        for number in range(3 + label):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), shade, dtype=np.uint8)).save(buffer, format="PNG")
            (tmp_path / "data" / f"class{label}" / f"{number}.png").write_bytes(buffer.getvalue())
    return tmp_path / "data"


def by_shade(images: Tensor) -> Tensor:
    """Returns logits that predict each shade correctly, except shade 2, which they call 3."""
    shade = (images.mean(dim=(1, 2, 3)) * 255).round()
    distance = (shade[:, None] - torch.tensor(SHADES, dtype=torch.float32)).abs()
    logits = -distance
    logits[shade == SHADES[2], 3] = 1.0
    return logits


def a_check(source, world=ALONE, batch_size=4):
    return ClassifierCheck(
        source, (8, 8), 5, world=world, batch_size=batch_size, crop_fraction=1.0, mean=(0.0,) * 3, std=(1.0,) * 3
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_every_image_counts_once(folder, batch_size):
    found = a_check(ImageFolderSource(folder), batch_size=batch_size).run(by_shade)
    wrong = 5  # the images of class 2
    assert len(found.labels) == 25 and found.top1 == pytest.approx(20 / 25) and found.top5 == 1.0
    assert found.predictions.tolist() == [3 if label == 2 else label for label in found.labels]
    counts = found.confusion(5).part(np.arange(5))
    assert counts.sum() == 25 and counts[2, 3] == wrong and counts[2, 2] == 0


def test_padding_of_uneven_processes_is_not_counted(folder):
    """Runs three processes over 25 images, with 9 each and the last two padded, and gathers the parts by hand."""
    source = ImageFolderSource(folder)
    whole = a_check(source).run(by_shade)
    parts: list[Tensor] = []

    class Process(World):
        def any(self, value):
            return value

        def gather(self, tensor):
            parts.append(tensor)
            return torch.stack(parts) if len(parts) == 3 else tensor[None].expand(3, *tensor.shape)

    for rank in range(3):
        world = Process(rank=rank, size=3, local_rank=0, local_size=1, device=torch.device("cpu"))
        found = a_check(source, world).run(by_shade)
    assert [len(part) for part in parts] == [9, 9, 9]
    assert (found.top1, found.top5) == (whole.top1, whole.top5) and found.loss == pytest.approx(whole.loss)
    assert np.array_equal(found.predictions, whole.predictions)


def test_top5_differs_from_top1_with_more_classes(folder):
    def sixth(images):
        return torch.arange(10.0).flip(0).expand(len(images), 10)  # class 0 is the likeliest, then 1, 2, 3, 4

    found = a_check(ImageFolderSource(folder)).run(sixth)
    assert found.top1 == pytest.approx(3 / 25) and found.top5 == 1.0
    expected = torch.logsumexp(torch.arange(10.0), 0) - np.mean([9.0 - label for label in found.labels])
    assert found.loss == pytest.approx(float(expected), rel=1e-6)


def test_labels_outside_the_classes_are_refused(folder):
    source = ImageFolderSource(folder)
    assert check_labels(source, 5, "data.train").tolist() == source.labels().tolist()
    with pytest.raises(
        DataError, match="7 of 25 images have no label from 0 to 3 .*class4/0.png.*; set model.num_classes=5,"
    ):
        check_labels(source, 4, "data.train")
    source.labels = lambda: np.array([0, -1, 2])
    with pytest.raises(DataError, match="data.train: 1 of 3 images .* with no label.; fix the labels"):
        check_labels(source, 4, "data.train")


def test_labels_are_the_sources_own(folder):
    for source in (ImageFolderSource(folder), SyntheticSource(1500, (8, 8))):
        assert source.labels().tolist() == [source.label(sample) for sample in range(source.num_samples)]


def test_class_names_must_be_as_many_as_classes(folder):
    source = ImageFolderSource(folder)
    assert class_names(source, 5) == [f"class{n}" for n in range(5)]
    assert class_names(SyntheticSource(10, (8, 8)), 7) is None
    with pytest.raises(DataError, match="names 5 classes .class0, class1, .*num_classes is 7; set model.num"):
        class_names(source, 7)


def test_the_report_holds_figures_table_and_pictures(tmp_path):
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    accuracy = Accuracy(top1=4 / 6, top5=1.0, loss=0.5, labels=labels, predictions=predictions)
    write_report(tmp_path, accuracy, 9, 3, ["a", "b", "c"])
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures == {"step": 9, "images": 6, "top1": 4 / 6, "top5": 1.0, "loss": 0.5}
    table = list(csv.DictReader((tmp_path / "classes.csv").open()))
    assert [row["class"] for row in table] == ["a", "b", "c"]
    assert float(table[0]["recall"]) == pytest.approx(2 / 3) and table[0]["most often taken for"] == "b"
    assert float(table[2]["precision"]) == 0.5 and table[2]["most often taken for"] == ""
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size[0] > 300


def test_a_class_without_images_has_no_recall():
    table = class_table(Confusion.count(np.array([1, 1]), np.array([0, 1]), 2), None)
    assert table[0]["recall"] is None and table[0]["precision"] == 0.0 and table[1]["most often taken for"] == 0


def test_labels_in_words():
    target = torch.tensor([0.01, 0.7, 0.29])
    assert label_text(target, ["a", "b", "c"]) == "b 70%\nc 29%"
    assert label_text(torch.tensor([1.0, 0.0]), None) == "0 100%"
    assert math.isclose(float(target.sum()), 1.0, rel_tol=1e-6)
