"""What a label means: spellings of numbers, names and their list, samples of several members."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.config.data import AugmentConfig, DataConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.shards.image_files import CsvImages
from ijepa_scale.data.sources.class_list import CLASSES
from ijepa_scale.data.sources.labels import differ_in_case, parse_label, same_to_readers, whole_number
from ijepa_scale.data.sources.open import build_source, training_order, training_source
from ijepa_scale.data.sources.tar_index import expand, index_path, index_tar, save_index
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from ijepa_scale.evaluate.class_lists import compare_classes
from ijepa_scale.evaluate.classification import check_labels
from launch import shards
from tests.unit.data.test_data_loader import jpeg


def spellings(number):
    """A strategy of ways to write a whole number."""
    plain = str(abs(number))
    digits = st.sampled_from([plain, f"0{plain}", f"{plain}.0", f"{plain}.", f"00{plain}.00"])
    sign = st.just("-") if number < 0 else st.sampled_from(["", "+"])
    power = st.sampled_from(["", "e0", "E+00"])
    around = st.sampled_from(["", " ", "\t"])
    quotes = st.sampled_from(["", '"', "'"])
    return st.tuples(around, quotes, around, sign, digits, power).map(
        lambda parts: "".join([*parts, parts[2], parts[1], parts[0]])
    )


@given(st.integers(-300, 300).flatmap(lambda number: st.tuples(st.just(number), spellings(number))))
def test_a_whole_number_is_the_same_in_any_spelling(case):
    number, text = case
    assert whole_number(text) == number
    contents = [(text.encode(), "cls")]
    contents += [(json.dumps({"label": value}).encode(), "json") for value in (text, float(number), number)]
    for content, kind in contents:
        if number < -1:
            with pytest.raises(ValueError):
                parse_label(content, kind)
        else:
            assert parse_label(content, kind) == (None if number == -1 else number)


@pytest.mark.parametrize(
    "text", ["", "cat", "1.5", "1e-1", "1_000", "0x1", "1,0", "--1", "1e", ".", "nan", "inf", "1 2"]
)
def test_other_texts_are_no_whole_numbers(text):
    assert whole_number(text) is None


def test_digits_of_other_scripts_are_the_same_numbers():
    assert whole_number("１２") == whole_number("١٢") == 12


@pytest.mark.parametrize(
    ("data", "kind", "label"),
    [
        (b"cat\n", "cls", "cat"), (b'"cat"', "cls", "cat"), (b"\xef\xbb\xbfcat", "cls", "cat"),
        (b"1_000", "cls", "1_000"), ("café".encode(), "cls", "café"),
        (b'{"label": " cat "}', "json", "cat"), (b'{"label": null}', "json", None),
        (b'{"caption": "x"}', "json", None), (b"3", "json", None),
    ],
)  # fmt: skip
def test_names(data, kind, label):
    assert parse_label(data, kind) == label


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "cls"), (b" '' ", "cls"), (b"\xff", "cls"), (b"a\0b", "cls"), (b"a\nb", "cls"), (b"x" * 1001, "cls"),
        (b"2147483648", "cls"), (b"-2147483649", "cls"), (b"1e300", "cls"), (b"9" * 9000, "cls"),
        (b'{"label": 1.5}', "json"), (b'{"label": true}', "json"), (b'{"label": [1]}', "json"),
        (b'{"label": NaN}', "json"), (b'{"label": Infinity}', "json"), (b'{"label": ""}', "json"), (b"{", "json"),
    ],
)  # fmt: skip
def test_what_is_no_label(data, kind):
    with pytest.raises(ValueError):
        parse_label(data, kind)


def test_names_that_read_the_same():
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert same_to_readers(["a", composed, "b", apart]) == (composed, apart)
    assert same_to_readers(["red car", "red  car"]) == ("red car", "red  car")
    assert same_to_readers(["Cat", "cat", "cart"]) is None and differ_in_case(["Cat", "dog", "cat"]) == [("Cat", "cat")]


def test_the_header_of_a_csv(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("Label, PATH\ncat,a.jpg\n")
    assert CsvImages(path).name(0) == str(tmp_path / "a.jpg") and CsvImages(path).classes == ["cat"]
    for separator, name in {";": "semicolon", "\t": "tab", "|": "bar"}.items():
        path.write_text(f"path{separator}label\na.jpg{separator}cat\n")
        with pytest.raises(DataError, match=f"its cells end at {name}s; separate them by commas"):
            CsvImages(path)
    path.write_text("file,label\n")
    with pytest.raises(DataError, match=r"begins with \['file', 'label'\]; its first line must name columns path and"):
        CsvImages(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="can't be read .not a regular file.; give a CSV file with path,label"):
        CsvImages(path)


def test_negative_labels_are_counted_and_minus_one_is_none(tmp_path):
    tar_of(tmp_path / "a.tar", {"jpg": True, "cls": b"-5"}, {"jpg": True, "cls": b"-1"}, {"jpg": True, "cls": b"2"})
    source = ShardSource(expand(tmp_path))
    assert source.labels().tolist() == [-1, 2] and dict(source.problems().counts) == {"bad label": 1}
    assert "b'-5' isn't a label; give a number or name" in source.problems().named[0].reason
    index = index_tar(tmp_path / "a.tar")
    labels = index.labels.copy()
    labels[1] = -7
    save_index(dataclasses.replace(index, labels=labels), index_path(tmp_path / "a.tar"))
    assert index_tar(tmp_path / "a.tar").labels.tolist() == [-1, 2]  # an index of an earlier version isn't used


def csv_of(tmp_path, *labels):
    path = tmp_path / "list.csv"
    path.write_text("path,label\n" + "".join(f"{number}.jpg,{label}\n" for number, label in enumerate(labels)))
    return CsvImages(path)


@given(data=st.data(), numbers=st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_csv_gives_the_numbers_that_it_spells(tmp_path_factory, data, numbers):
    texts = [data.draw(spellings(number)).rstrip() for number in numbers]  # after a quote, CSV allows no space
    source = csv_of(tmp_path_factory.mktemp("csv"), *texts)
    assert source.labels().tolist() == numbers and source.classes is None


def test_names_in_a_csv(tmp_path, caplog):
    source = csv_of(tmp_path, "dog", ' "cat"', "'dog'", "cat ", '"a, b"')
    assert source.classes == ["a, b", "cat", "dog"] and source.labels().tolist() == [2, 1, 2, 1, 0]
    assert not caplog.text
    assert csv_of(tmp_path, "Cat", "cat").classes == ["Cat", "cat"]
    assert "classes 'Cat' and 'cat' (lines 2 and 3) differ in case only; check that both are meant" in caplog.text


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("cat", "1"), r"has labels '1' and 'cat'; use either only numbers or only names \(lines 3 and 2\)"),
        (("1", "1.5"), r"has labels '1' and '1.5'; use either only numbers or only names \(lines 2 and 3\)"),
        (("1", "-1"), r"has the label -1; labels are below 2147483648 and not below 0 \(line 3\)"),
        (("cat", "cat\u200b"), r"has labels 'cat' and 'cat\\u200b', which read the same; .* \(lines 2 and 3"),
        (("café", "cafe\u0301"), r"has labels 'caf\\xe9' and 'cafe\\u0301', which read the same"),
        (("red car", "a", "red  car"), r"'red car' and 'red  car', which read the same; .* \(lines 2 and 4"),
        (("1", "a, b"), r"line 3: .* has 3 cells, the first line 2; put a path or label with a comma into quotes"),
        (("1", '""'), "line 3: .* lacks a path or a label; add it"),
    ],
)  # fmt: skip
def test_labels_that_a_csv_is_refused_for(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        csv_of(tmp_path, *labels)


def tar_of(path, *samples):
    """Writes a tar of samples, each a dict of members by suffix; True stands for an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for suffix, content in members.items():
                data = jpeg(number) if content is True else content
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def labelled(folder, *labels, name="a"):
    return tar_of(folder / f"{name}.tar", *({"jpg": True, "cls": label.encode()} for label in labels))


def source_of(folder):
    return ShardSource(expand(folder))


@given(data=st.data(), numbers=st.lists(st.integers(0, 30), min_size=1, max_size=6))
@settings(deadline=None)
def test_shards_give_the_numbers_that_they_spell(tmp_path_factory, data, numbers):
    folder = tmp_path_factory.mktemp("shards")
    texts = [data.draw(spellings(number)) for number in numbers]
    labelled(folder, *texts)
    spelled = [{"jpg": True, "json": json.dumps({"label": text}).encode()} for text in texts]
    tar_of(folder / "b.tar", *spelled)
    for _ in range(2):  # scanned, then loaded
        assert source_of(folder).labels().tolist() == numbers + numbers


def crops_of(folder, **options):
    config = DataConfig(train=str(folder), batch_size=3, workers=0, **options)
    source = training_source(config, (8, 8))
    order = training_order(config, source, 3, seed=0, steps_per_epoch=1)
    loader = TrainLoader(source, order, AugmentConfig(), (8, 8), seed=0, stop_step=2)
    return [(batch.sample_ids.tolist(), batch.pixels.numpy().tobytes(), batch.labels.tolist()) for batch in loader]


@pytest.mark.parametrize("reader", ["shards", "stream"])
def test_names_can_be_pretrained_on(tmp_path, reader):
    """The images and their order are those of the same shards with numbers."""
    labelled(tmp_path / "names", "cat", "dog", '"cat"', "3a")
    labelled(tmp_path / "numbers", "000", "001", "00002", "03")  # labels as long: the same offsets in the tar
    named, numbered = (crops_of(tmp_path / kind, reader=reader) for kind in ("names", "numbers"))
    assert [pixels for _, pixels, _ in named] == [pixels for _, pixels, _ in numbered]
    assert [ids for ids, _, _ in named] == [ids for ids, _, _ in numbered]
    assert all(label == -1 for _, _, labels in named for label in labels)
    assert any(label > 0 for _, _, labels in numbered for label in labels)


def test_names_are_numbered_by_the_written_list(tmp_path, capsys):
    labelled(tmp_path, "dog", "cat", name="a")
    labelled(tmp_path, "emu", '"dog"', " cat\n", name="b")
    with pytest.raises(
        DataError, match=r"a.tar:000 has the label 'cat'|a.tar:001 has the label 'cat'.* no .*classes.json"
    ):
        check_labels(source_of(tmp_path), 3, "data.train")
    assert shards.main(["info", str(tmp_path)]) == 0
    assert "3 names, cat, dog, emu\nimages per label  min 1, median 2, max 2" in capsys.readouterr().out
    assert shards.main(["classes", str(tmp_path)]) == 0
    assert "classes.json: 3 classes, 'cat' to 'emu'" in capsys.readouterr().out
    assert json.loads((tmp_path / CLASSES).read_text()) == ["cat", "dog", "emu"]
    source = source_of(tmp_path)
    assert check_labels(source, 3, "data.train").tolist() == [1, 0, 2, 1, 0] and source.label(2) == 2
    assert source.classes == ["cat", "dog", "emu"] and shards.main(["verify", "--workers", "0", str(tmp_path)]) == 0
    (tmp_path / CLASSES).write_text('["emu", "dog", "cat"]')  # the list decides, not the alphabet
    assert source_of(tmp_path).labels().tolist() == [1, 2, 0, 1, 2]
    capsys.readouterr()
    assert shards.main(["classes", str(tmp_path)]) == 2
    assert "classes.json exists and numbers the classes; remove it if it is wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (["cat"], ("cat", "dog"), r"a.tar:001 has the label 'dog', which .*classes.json doesn't name; correct"),
        (["cat", "dog", "cat"], ("cat", "dog"), "classes.json names 'cat' twice, so labels that are names can't"),
        (["cat"], ("cat", "3"), "a.tar:001 has the label 3, .*a.tar:000 the label 'cat'; use either"),
        (None, ("cat", "dog"), "a.tar:000 has the label 'cat', but there is no .*classes.json .*shards.py classes"),
    ],
)  # fmt: skip
def test_names_that_no_list_numbers(tmp_path, classes, labels, message):
    labelled(tmp_path, *labels)
    if classes is not None:
        (tmp_path / CLASSES).write_text(json.dumps(classes))
    source = source_of(tmp_path)
    with pytest.raises(DataError, match=message):
        source.labels()
    with pytest.raises(DataError, match=message):
        check_labels(source, 3, "data.train")


def test_lists_that_cannot_be_written(tmp_path, capsys):
    def refused(*labels):
        labelled(tmp_path, *labels)
        assert shards.main(["classes", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "labels of these shards are numbers or missing; only names need a class list" in refused("1", "2")
    assert "use either only numbers or only names" in refused("1", "cat")
    assert "labels 'red  car' of" in refused("red  car", "red car") and not (tmp_path / CLASSES).exists()
    labelled(tmp_path / "b", "cat")
    assert shards.main(["classes", f"{tmp_path}/{{b/,}}a.tar"]) == 2
    assert "names shards in 2 folders; name those of one folder" in capsys.readouterr().err
    labelled(tmp_path, "Cat", "cat")
    assert shards.main(["classes", str(tmp_path)]) == 0
    assert "warning: the list has classes 'Cat' and 'cat', which differ only in case" in capsys.readouterr().err


def test_verify_names_labels_that_the_list_lacks(tmp_path, capsys):
    labelled(tmp_path, "cat", "dog")
    (tmp_path / CLASSES).write_text('["cat"]')
    assert shards.main(["verify", "--workers", "0", str(tmp_path)]) == 2
    assert "a.tar:001: label 'dog' is not among the 1 class names" in capsys.readouterr().out


def test_folders_with_different_lists_are_refused(tmp_path):
    for name, classes in (("a", ["x", "y"]), ("b", ["y", "x"])):
        labelled(tmp_path / name, "0", "1")
        (tmp_path / name / CLASSES).write_text(json.dumps(classes))
    with pytest.raises(DataError, match="a/classes.json and .*b/classes.json list different classes, so equal labels"):
        build_source("shards", f"{tmp_path}/{{a,b}}/a.tar")


def test_the_fingerprint_depends_on_names_but_not_on_their_list(tmp_path):
    labelled(tmp_path, "cat", "dog")
    first = source_of(tmp_path).fingerprint
    (tmp_path / CLASSES).write_text('["cat", "dog"]')
    assert source_of(tmp_path).fingerprint == first  # so that pretraining goes on
    labelled(tmp_path, "cow", "dog")
    assert source_of(tmp_path).fingerprint != first


def named(folder, *labels, classes=None):
    labelled(folder, *labels)
    if classes is not None:
        (folder / CLASSES).write_text(json.dumps(classes))
    return source_of(folder)


def test_names_of_an_evaluation_set_are_numbered_by_the_training_list(tmp_path, caplog):
    train = named(tmp_path / "t", "a", "b", classes=["a", "b"])
    test = named(tmp_path / "v", "b", "a", "b")
    compare_classes(("data.train", train), ("evaluate.test", test))
    assert test.labels().tolist() == [1, 0, 1] and not caplog.text
    test = named(tmp_path / "w", "b", "c")
    with pytest.raises(DataError, match="has the label 'c', which the class list of data.train doesn't name"):
        compare_classes(("data.train", train), ("evaluate.test", test))


def test_names_on_one_side_only_are_compared_by_number(tmp_path, caplog):
    names, numbers = named(tmp_path / "t", "0", "1", classes=["a", "b"]), named(tmp_path / "v", "1", "0")
    for train, other, unnamed in ((names, numbers, "evaluate.test"), (numbers, names, "data.train")):
        caplog.clear()
        compare_classes(("data.train", train), ("evaluate.test", other))
        assert f"names its 2 classes, {unnamed} doesn't, so labels are compared by number only" in caplog.text
        assert "check that label 0 is 'a' in both" in caplog.text
    caplog.clear()
    compare_classes(("data.train", names), ("evaluate.test", numbers), log=False)
    compare_classes(("data.train", numbers), ("evaluate.test", numbers))
    assert not caplog.text


@pytest.mark.parametrize("numbers_train", [True, False])
def test_folders_called_by_numbers_are_not_the_numbers(tmp_path, numbers_train):
    """Sorted as text, folder 10 is label 2."""
    numbers = named(tmp_path / "t", *map(str, range(11)))
    folders = named(tmp_path / "v", "0", classes=sorted(map(str, range(11))))
    pair = (("data.train", numbers), ("evaluate.test", folders))
    with pytest.raises(DataError, match="by numbers in another order .label 2 is class '10'., as sorted folders"):
        compare_classes(*(pair if numbers_train else pair[::-1]))
    padded = named(tmp_path / "w", "0", classes=sorted(f"{number:02d}" for number in range(11)))
    compare_classes(pair[0], ("evaluate.test", padded))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("a.jpg,cat", "a.jpg,dog"), r"gives a.jpg the labels 'cat' and 'dog' \(lines 2 and 3\); keep one"),
        (("a.jpg,0", "b.jpg,1", "./a.jpg,1"), r"gives ./a.jpg the labels '0' and '1' \(lines 2 and 4\); keep one"),
    ],
)
def test_one_image_has_one_label(tmp_path, lines, message):
    (tmp_path / "a.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    with pytest.raises(DataError, match=message):
        CsvImages(tmp_path / "a.csv")


def test_one_label_in_two_spellings_is_one_label(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\na.jpg,1\na.jpg,01\n")
    assert CsvImages(tmp_path / "a.csv").labels().tolist() == [1, 1]


def test_a_column_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("path,label,label\na.jpg,0,1\n")
    with pytest.raises(DataError, match="has the column label twice; keep one"):
        CsvImages(tmp_path / "a.csv")


def test_labels_that_training_lacks_are_named(tmp_path, caplog):
    train, test = named(tmp_path / "t", "0", "1"), named(tmp_path / "v", "1", "2", "4", "5", "6")
    compare_classes(("data.train", train), ("evaluate.test", test))
    assert "evaluate.test has 4 labels that no image of data.train has (2, 4, 5, ...)" in caplog.text


def test_different_names_are_refused(tmp_path):
    train = named(tmp_path / "t", "0", "1", classes=["a", "b"])
    for classes, reason in ((["b", "a"], "in another order"), (["a", "c"], "only one has b, c")):
        test = named(tmp_path / reason, "0", "1", classes=classes)
        with pytest.raises(DataError, match=rf"train and evaluate.test have different classes \({reason}\)"):
            compare_classes(("data.train", train), ("evaluate.test", test))
