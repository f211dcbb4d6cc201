"""Class names that a person may take for one: warned about, or refused where they choose the class."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config import PretrainConfig
from ijepa_scale.config.data import DataConfig
from ijepa_scale.data.sources.class_list import CLASSES
from ijepa_scale.data.sources.labels import class_warnings, same_to_readers
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from ijepa_scale.train.setup import open_training_source
from launch import shards
from tests.unit.data.test_data_loader import jpeg
from tests.unit.data.test_labels import labelled

INVISIBLE = "\u200b\ufeff\u00ad\u2060\ufe0f\u3164"


@given(
    st.text(alphabet="aé ñ日-", min_size=1).filter(str.strip),
    st.sampled_from(["NFC", "NFD"]),
    st.sampled_from(["", " ", "\u00a0", *INVISIBLE]),
    st.booleans(),
)
def test_names_that_read_the_same_are_found_in_every_form(name, form, around, upper):
    other = unicodedata.normalize(form, around + name + around)
    same = same_to_readers([name, "z", other])
    assert same == ((name, other) if other != name else None)
    other = unicodedata.normalize(form, around + (name.upper() if upper else name) + around)
    found = class_warnings([name, "z", other], "x")
    if other == name:
        assert found == [f"x names {ascii(name)} twice, as two classes; check that both are meant"]
    else:
        (line,) = found
        how = "in case" if upper and name.upper() != name else "in spaces, invisible characters or kind of accents"
        assert line == (
            f"x has classes {ascii(name)} and {ascii(other)}, which differ only {how}; check that both are meant"
        )


def test_many_pairs_are_counted():
    found = class_warnings([*(f"a{n}" for n in range(9)), *(f"A{n}" for n in range(9))], "x")
    assert len(found) == 5 and found[-1].endswith("; 4 more such pairs")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["cat", "dog", "cat"], "classes.json names 'cat' twice"),
        (["cat", "cat\u200b"], r"classes.json names 'cat' and 'cat\\u200b', which read the same"),
        (["cat ", "dog"], r"a.tar:000 has the label 'cat', .*classes.json names 'cat ', which reads the same"),
    ],
)
def test_a_list_that_numbers_names_is_unique(tmp_path, names, said):
    labelled(tmp_path, "cat")
    (tmp_path / CLASSES).write_text(json.dumps(names))
    with pytest.raises(DataError, match=said):
        ShardSource(expand(tmp_path)).labels()


def test_a_list_that_names_numbers_is_warned_about(tmp_path, caplog):
    """As ImageNet's: it has two classes called crane."""
    labelled(tmp_path, "0", "1")
    (tmp_path / CLASSES).write_text('["crane", "crane"]')
    data = DataConfig(train=str(tmp_path), batch_size=1)
    assert open_training_source(PretrainConfig(data=data), log=True).labels().tolist() == [0, 1]
    assert "data.train names 'crane' twice, as two classes; check that both are meant" in caplog.text


def test_class_folders_that_read_the_same_are_warned_about(tmp_path, caplog, capsys):
    names = ["café", "cafe\u0301", "Dog", "dog", "emu", "emu\u200b"]
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.jpg").write_bytes(jpeg(0))
    data = DataConfig(reader="imagefolder", train=str(tmp_path / "set"), batch_size=1)
    source = open_training_source(PretrainConfig(data=data), log=True)
    assert source.classes == sorted(names)  # as in torchvision
    unseen = "which differ only in spaces, invisible characters or kind of accents; check that both are meant"
    expected = [
        "has classes 'Dog' and 'dog', which differ only in case; check that both are meant",
        f"has classes 'cafe\\u0301' and 'caf\\xe9', {unseen}",
        f"has classes 'emu' and 'emu\\u200b', {unseen}",
    ]
    assert all(f"data.train {line}" in caplog.text for line in expected), caplog.text
    to = tmp_path / "shards"
    assert shards.main(["make", "--root", str(tmp_path / "set"), "--to", str(to), "--workers", "0"]) == 0
    said = capsys.readouterr().err
    assert all(line in said for line in expected), said
    assert shards.main(["info", str(to)]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in expected), said
