"""Subsets by name: what a file names is read, in any layout, and what it doesn't name isn't."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_scale.config import DataConfig
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.folder import ImageFolderSource
from ijepa_scale.data.sources.open import training_source
from ijepa_scale.data.sources.subset import SubsetSource, write_subset
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import ConfigError, DataError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: the names of ImageNet's training files, and one name that two classes share."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("n01/n01_1.JPEG", "n01/n01_2.JPEG", "n02/n02_1.JPEG", "n02/n02_7.png", "n01/same.png", "n02/same.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def subset(whole: ImageFolderSource | ShardSource, text: str, path: Path) -> SubsetSource:
    path.write_text(text)
    return SubsetSource(whole, path)


def test_the_published_form_is_read(folder, tmp_path):
    found = subset(ImageFolderSource(folder), "# 1%\nn02_1.JPEG\n\nn01_2.JPEG\nn02/same.png\n", tmp_path / "a.txt")
    assert [found.read(n) for n in range(3)] == [b"n01/n01_2.JPEG", b"n02/n02_1.JPEG", b"n02/same.png"]
    assert found.labels().tolist() == [0, 1, 1] == [found.label(n) for n in range(3)]
    assert found.classes == ["n01", "n02"] and found.shard_sizes.tolist() == [3] and found.num_samples == 3
    assert found.name(1).endswith("n02/n02_1.JPEG") and "3 images that" in found.summary()
    other = subset(ImageFolderSource(folder), "n01_2.JPEG\n", tmp_path / "b.txt")
    assert len({found.fingerprint, other.fingerprint, ImageFolderSource(folder).fingerprint}) == 3


def test_names_of_shards_have_no_suffix(tmp_path):
    write_shards([Sample(f"n01_{n}", PNG + bytes([n]), n % 2) for n in range(9)], tmp_path / "shards", shard_bytes=3000)
    whole = ShardSource(expand(tmp_path / "shards"))
    found = subset(whole, "n01_7.JPEG\nn01_2\n", tmp_path / "a.txt")
    assert [found.read(n) for n in range(2)] == [PNG + bytes([2]), PNG + bytes([7])]
    assert found.labels().tolist() == [0, 1]


@given(st.sets(st.integers(0, 5), min_size=1))
def test_a_written_file_is_read_back(folder, tmp_path_factory, chosen):
    whole, path = ImageFolderSource(folder), tmp_path_factory.mktemp("s") / "a.txt"
    ids = np.array(sorted(chosen))
    write_subset(whole, ids, path)
    found = SubsetSource(whole, path)
    assert [found.read(n) for n in range(found.num_samples)] == [whole.read(n) for n in ids.tolist()]
    assert str(folder) not in path.read_text()  # it can move to another machine


@given(st.sets(st.text("#a .\n\x0b\u2028\udcff", min_size=1, max_size=3), min_size=2, max_size=4), st.data())
def test_any_file_names_are_read_back_or_refused(tmp_path_factory, names, data):
    folder = tmp_path_factory.mktemp("named")
    (folder / "class").mkdir()
    for name in names:
        (folder / "class" / f"{name}.png").write_bytes(name.encode(errors="surrogateescape"))
    whole = ImageFolderSource(folder)
    ids = np.array(sorted(data.draw(st.sets(st.integers(0, whole.num_samples - 1), min_size=1))))
    given_names = [Path(whole.name(number)).name for number in ids.tolist()]
    if any(len(name.splitlines()) > 1 for name in given_names):
        with pytest.raises(DataError, match="isn't a line of its own, such as with a line break"):
            write_subset(whole, ids, folder / "a.txt")
        return
    write_subset(whole, ids, folder / "a.txt")
    found = SubsetSource(whole, folder / "a.txt")
    assert [found.read(n) for n in range(found.num_samples)] == [whole.read(n) for n in ids.tolist()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n03_1.JPEG\n", "'n03_1.JPEG' names no image of .*the first is .*; give the end of one image's path"),
        ("same.png\n", "'same.png' names several images"),
        ("# nothing\n", "names no image; give a text file with a name per line"),
    ],
)
def test_other_names_are_refused(folder, tmp_path, text, said):
    with pytest.raises(DataError, match=said):
        subset(ImageFolderSource(folder), text, tmp_path / "a.txt")
    with pytest.raises(DataError, match="nowhere.txt can't be read"):
        SubsetSource(ImageFolderSource(folder), tmp_path / "nowhere.txt")


def test_a_run_trains_on_the_subset_of_its_configuration(folder, tmp_path):
    (tmp_path / "a.txt").write_text("n02_1.JPEG\nn01_1.JPEG\n")
    config = DataConfig(reader="imagefolder", train=str(folder), subset=str(tmp_path / "a.txt"), batch_size=2)
    assert training_source(config, (8, 8)).num_samples == 2
    with pytest.raises(DataError, match=r"data.subset needs local images, but data.train is https://host/0.tar"):
        training_source(
            DataConfig(train="https://host/0.tar", subset="a.txt", cache=str(tmp_path), batch_size=2), (8, 8)
        )
    with pytest.raises(ConfigError, match="subset is a.txt, but reader synthetic has no named images; use shards"):
        DataConfig(reader="synthetic", subset="a.txt", batch_size=2)
