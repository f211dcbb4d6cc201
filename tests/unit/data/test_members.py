"""Samples of several images or labels: which member is read, and what is said without a choice."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ijepa_scale.config.data import DataConfig
from ijepa_scale.data.sources.open import build_source, training_source
from ijepa_scale.data.sources.scan import Members
from ijepa_scale.data.sources.source import check_problems
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.sources.tar_index import index_path, index_tar
from ijepa_scale.errors import ConfigError, DataError
from launch import shards
from tests.unit.data.test_data_loader import jpeg
from tests.unit.data.test_labels import tar_of

SEVERAL = {"jpg": True, "mask.png": b"\x89PNG", "cls": b"1", "coarse.cls": b"7", "json": b'{"label": 9}'}


def read(folder, reader="shards", **members):
    """Returns the images' bytes and the labels."""
    config = DataConfig(reader=reader, train=str(folder), batch_size=1, **members)
    source = training_source(config, (8, 8))
    if isinstance(source, StreamSource):
        samples = [next(source.stream(0, 0, 0, 1)) for _ in range(1)]
        if samples[0].kind is not None:
            raise DataError(f"{samples[0].kind}: {samples[0].reason}")
        return [sample.data for sample in samples], [sample.label for sample in samples]
    check_problems(source.problems(), source.num_samples, 0.001)
    return [source.read(sample) for sample in range(source.num_samples)], source.labels().tolist()


@pytest.mark.parametrize("reader", ["shards", "stream"])
def test_a_member_is_chosen_among_several(tmp_path, reader):
    tar_of(tmp_path / "a.tar", SEVERAL)
    with pytest.raises(
        DataError, match="its images are jpg, mask.png; choose the one to read, like data.image_member=jpg"
    ):
        read(tmp_path, reader)
    with pytest.raises(
        DataError, match="its labels are cls, coarse.cls; choose the one to read, like data.label_member=cls"
    ):
        read(tmp_path, reader, image_member="jpg")
    for image, label, expected in (("jpg", "cls", 1), (".JPG", "coarse.cls", 7), ("mask.png", "json", 9)):
        images, labels = read(tmp_path, reader, image_member=image, label_member=label)
        assert images == [b"\x89PNG" if "png" in image else jpeg(0)] and labels == [expected]
    with pytest.raises(DataError, match="no image webp, but jpg, mask.png; correct data.image_member"):
        read(tmp_path, reader, image_member="webp", label_member="cls")


def test_a_stream_notices_samples_whose_members_lie_apart(tmp_path):
    """Each part would otherwise be taken for a sample with one image."""
    tar_of(tmp_path / "a.tar", SEVERAL, {"jpg": True, "cls": b"5"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name in ("002.jpg", "001.mask.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(2))
            tar.addfile(info, io.BytesIO(jpeg(2)))
    stream = StreamSource(str(tmp_path), shuffle=1).stream(0, 0, 0, 1)
    found = [sample for sample, _ in zip(stream, range(4), strict=False)]
    assert [sample.kind for sample in found] == ["several images", None, None, "split sample"]
    assert "its members aren't next to each other in the tar; sort them by name" in found[3].reason
    assert index_tar(tmp_path / "a.tar").problems.counts == {"several images": 2}


def test_members_that_are_not_chosen_are_no_files_that_are_passed_over(tmp_path):
    """Junk, images of other formats and other files are counted with a choice, too."""
    tar = tar_of(tmp_path / "a.tar", {**SEVERAL, "tif": True, "psd": b"8BPS", "txt": b"?"})
    with tarfile.open(tar, "a") as file:
        file.addfile(tarfile.TarInfo("._000.tif"))
    index = index_tar(tar, Members("tif", "coarse.cls"))
    assert index.labels.tolist() == [7] and not index.problems.counts
    assert index.problems.passed_over() == "1 x .psd, 1 x .txt, 1 x ._*"
    assert index_tar(tar, Members("tif", "coarse.cls")).problems.passed_over() == index.problems.passed_over()


def test_each_choice_of_members_has_its_own_index(tmp_path):
    tar = tar_of(tmp_path / "a.tar", SEVERAL, {**SEVERAL, "cls": b"2"})
    choices = [None, Members("jpg", "cls"), Members("mask.png", "cls"), Members("jpg", "coarse.cls"), Members("jpg")]
    assert len({index_path(tar, choice) for choice in choices}) == len(choices)
    for _ in range(2):  # scanned, then loaded
        found = [index_tar(tar, choice) for choice in choices]
        assert [index.labels.tolist() for index in found] == [[], [1, 2], [1, 2], [7, 7], []]
        assert [len(index) for index in found] == [0, 2, 2, 2, 0]
    assert (found[1].offsets != found[2].offsets).all()
    assert all(index_path(tar, choice).exists() for choice in choices)


def test_one_cls_counts_before_json_and_alike_labels_are_one(tmp_path):
    tar_of(
        tmp_path / "a.tar",
        {"jpg": True, "json": b'{"label": 9}', "cls": b"1"},
        {"jpg": True, "cls": b"2", "json": b'{"label": 9}'},
        {"jpg": True, "meta.json": b'{"caption": "x"}', "json": b'{"label": 3}'},
        {"jpg": True, "cls": b"4", "CLS": b"4.0"},
    )
    assert read(tmp_path)[1] == [1, 2, 3, 4]
    tar_of(tmp_path / "a.tar", {"jpg": True, "a.json": b'{"label": 9}', "json": b'{"label": 9}'})
    with pytest.raises(DataError, match="its labels are a.json, json; choose"):
        read(tmp_path)


def test_members_are_checked_in_the_configuration():
    assert DataConfig(batch_size=1, image_member=" .RGB.png").image_member == "rgb.png"
    with pytest.raises(
        ConfigError, match="image_member.*'a/b' isn't a suffix of a member; give what follows the first dot"
    ):
        DataConfig(batch_size=1, image_member="a/b")
    with pytest.raises(
        ConfigError, match="label_member is cls, but reader imagefolder has no samples of several members"
    ):
        DataConfig(batch_size=1, reader="imagefolder", label_member="cls")
    with pytest.raises(SystemExit):
        shards.main(["info", "--image-member", "a b", "x"])


def test_members_do_not_apply_to_evaluation_sets_without_them(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(1))
    assert build_source("imagefolder", tmp_path, members=Members("jpg", "cls")).labels().tolist() == [0, 1]


@given(
    st.lists(st.sampled_from(["jpg", "png", "a.jpg", "cls", "b.cls", "json", "txt"]), unique=True, max_size=6),
    st.data(),
)
def test_shards_and_streams_choose_the_same_members(tmp_path_factory, suffixes, data):
    """Whatever the members and their order in the tar, both readers give one image and label, or the same problem."""
    assume(suffixes)
    folder = tmp_path_factory.mktemp("tar")
    contents = {"cls": b"1", "b.cls": b"2", "json": b'{"label": 3}', "txt": b"text"}
    tar_of(folder / "a.tar", {suffix: contents.get(suffix, True) for suffix in suffixes}, {"jpg": True, "cls": b"5"})
    image, label = (data.draw(st.sampled_from(names)) for names in ((None, "jpg", "png"), (None, "cls", "b.cls")))
    members = Members(image, label)
    index = index_tar(folder / "a.tar", members)
    streamed = StreamSource(str(folder), shuffle=1, members=members)
    if len(index):
        samples = [sample for sample, _ in zip(streamed.stream(0, 0, 0, 1), range(2), strict=False)]
        once = [sample for sample in samples if sample.pass_number == 0]
        good = [(len(sample.data), sample.label) for sample in once if sample.kind is None]
        assert good == list(zip(index.sizes.tolist(), index.labels.tolist(), strict=True))
        kinds = [sample.kind for sample in once if sample.kind]
        assert kinds == list(index.problems.counts.elements()) or (
            index.problems.counts == {"no image": 1} and not {"jpg", "png", "a.jpg"} & set(suffixes)
        )  # a stream passes over samples without any image or label
