"""Parquet files: Hugging Face's layout and plain bytes, labels by number and by name, and what is refused."""

import pickle
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ijepa_scale.data.shards import parquet
from ijepa_scale.data.shards.command_line import open_images
from ijepa_scale.data.shards.journal import JOURNAL
from ijepa_scale.data.shards.make import MakePlan, make_shards
from ijepa_scale.data.shards.parquet import Columns, ParquetImages
from ijepa_scale.data.sources.tar_index import expand
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError, SampleError
from tests.unit.data.shards.image_sets import encoded, parquet_of, tree

IMAGES = [encoded(n, ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(20)]
PLAN = MakePlan(shard_bytes=3000)


def images_of(source):
    return [(source.read(n), source.label(n)) for n in range(source.num_samples)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_each_row_becomes_one_sample(tmp_path, rows, workers):
    (tmp_path / "in").mkdir()
    names = ["dog", "cat", "bird"]
    for part, span in enumerate((slice(0, 8), slice(8, 20))):
        labels = [n % 3 for n in range(20)][span]
        path = tmp_path / "in" / f"train-0000{part}-of-00002.parquet"
        parquet_of(IMAGES[span], path, labels=labels, names=names, rows=rows)
    source = open_images("parquet", str(tmp_path / "in"))
    assert images_of(source) == [(image, n % 3) for n, image in enumerate(IMAGES)] and source.classes == names
    assert source.labels().tolist() == [n % 3 for n in range(20)]
    assert source.summary() == "20 images in 2 Parquet files, images from image, labels from label"
    assert source.name(9).endswith("train-00001-of-00002.parquet:1")
    make_shards(source, tmp_path / "to", plan=PLAN, workers=workers)
    shards = ShardSource(expand(tmp_path / "to"))
    assert Counter(images_of(shards)) == Counter(images_of(source)) and shards.classes == names
    assert images_of(shards) != images_of(source)  # mixed
    make_shards(ParquetImages(tmp_path / "in"), tmp_path / "again", plan=PLAN)
    assert tree(tmp_path / "to") == tree(tmp_path / "again")
    assert images_of(pickle.loads(pickle.dumps(source))) == images_of(source)


def test_a_window_of_row_groups_is_read_once(tmp_path, monkeypatch):
    """Otherwise making shards would read a whole row group for each image."""
    monkeypatch.setattr(parquet, "_WINDOW_BYTES", 6000)
    source = ParquetImages(parquet_of(IMAGES, tmp_path / "a.parquet", rows=2))
    assert 1 < source.window_shards < 10
    reads = []
    read_group = ParquetImages._read_group
    monkeypatch.setattr(ParquetImages, "_read_group", lambda self, n: reads.append(n) or read_group(self, n))
    made = make_shards(source, tmp_path / "to", plan=PLAN)
    assert made.num_samples == 20 and sorted(reads) == list(range(10))


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    path = parquet_of(IMAGES, tmp_path / "a.parquet", labels=[n % 3 for n in range(20)])
    make_shards(ParquetImages(path), tmp_path / "whole", plan=PLAN)
    source = ParquetImages(path)
    read, left = source.read, iter(range(12))

    def reading(sample):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(sample)

    source.read = reading
    with pytest.raises(KeyboardInterrupt):
        make_shards(source, tmp_path / "to", plan=PLAN)
    assert (tmp_path / "to" / JOURNAL).exists()
    make_shards(ParquetImages(path), tmp_path / "to", plan=PLAN)
    assert tree(tmp_path / "to") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("labels", "options", "expected", "classes"),
    [
        (None, {}, [-1, -1, -1, -1], None),
        ([7, 0, -1, None], {}, [7, 0, -1, -1], None),
        ([1, 0, -1, None], {"names": ["a", "b"]}, [1, 0, -1, -1], ["a", "b"]),
        (["cat", "ant", "cat", None], {}, [1, 0, 1, -1], ["ant", "cat"]),
        (["3", "3.0", "03", "1"], {}, [3, 3, 3, 1], None),
        ([None] * 4, {}, [-1] * 4, None),
    ],
)
def test_labels(tmp_path, labels, options, expected, classes):
    kind = None if labels is None or any(one is not None for one in labels) else pa.int64()
    column = None if labels is None else pa.array(labels, kind)
    source = ParquetImages(parquet_of(IMAGES[:4], tmp_path / "a.parquet", labels=column, **options))
    assert source.labels().tolist() == expected and source.classes == classes
    if labels is None:
        assert source.summary().endswith("images from image, no labels (columns image)")


def test_columns_are_chosen(tmp_path):
    path = parquet_of(IMAGES[:4], tmp_path / "a.parquet", plain=True, column="photo", depth=pa.array(IMAGES[4:8]),
                      fine=pa.array([3, 2, 1, 0]), caption=pa.array(["x"] * 4))  # fmt: skip
    with pytest.raises(DataError, match=r"has 2 columns that may be images .photo, depth.; choose one with --image-co"):
        ParquetImages(path)
    for name, images in (("photo", IMAGES[:4]), ("depth", IMAGES[4:8])):
        source = ParquetImages(path, Columns(name, "fine"))
        assert images_of(source) == list(zip(images, [3, 2, 1, 0], strict=True))
    assert ParquetImages(path, Columns("photo")).labels().tolist() == [-1] * 4
    for columns, message in (
        (Columns("caption"), "no column caption of bytes; --image-column may be photo, depth"),
        (Columns("photo", "coarse"), "no column coarse; --label-column may be one of photo, depth, fine, caption"),
        (Columns("photo", "photo"), "column photo holds bytes; labels are whole numbers or names"),
    ):
        with pytest.raises(DataError, match=message):
            ParquetImages(path, columns)
    for reader in ("csv", "zip", "CIFAR10"):
        with pytest.raises(DataError, match=f"--image-column and --label-column are for parquet, not for {reader}"):
            open_images(reader, str(path), columns=Columns("photo"))
    with pytest.raises(DataError, match="--split train is not for parquet; name the files of the split"):
        open_images("parquet", str(path), split="train")


def test_splits_are_not_mixed(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002-0123abcd", "test-00000-of-00001", "validation-0-of-1"):
        parquet_of(IMAGES[:2], tmp_path / f"{name}.parquet")
    with pytest.raises(
        DataError, match=rf"several splits .test, train, validation.; .* like {tmp_path}/train-\*.parquet"
    ):
        ParquetImages(tmp_path)
    assert ParquetImages(f"{tmp_path}/train-*.parquet").num_samples == 4
    parquet_of(IMAGES[:2], tmp_path / "train-00001-of-00002-0123abcd.parquet", labels=[0, 1])
    with pytest.raises(DataError, match="have different columns or class names; make a set of each"):
        ParquetImages(f"{tmp_path}/train-*.parquet")


def test_bad_images_cost_themselves(tmp_path):
    images = [IMAGES[0], None, b"", b"no image", IMAGES[1]]
    path = parquet_of(images, tmp_path / "a.parquet", rows=10)
    result = make_shards(ParquetImages(path), tmp_path / "to", max_bad_fraction=0.7)
    assert result.num_samples == 2 and result.left_out == {"no image": 1, "image size": 1, "not decodable": 1}
    content = path.read_bytes()
    for row in (100, 300, 500):
        (tmp_path / "b.parquet").write_bytes(content[:row] + bytes(200) + content[row + 200 :])
        source = ParquetImages(tmp_path / "b.parquet")
        found = Counter()
        for n in range(5):
            try:
                found[source.read(n) in images] += 1
            except SampleError as error:
                found[error.kind] += 1
        assert found.total() == 5


def test_repeated_bytes_take_no_memory(tmp_path):
    """A small file may claim gigabytes by repeating one image, which is kept once."""
    table = pa.table({"image": pa.array([bytes(1 << 20)] * 2000).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)  # read as plain bytes, unless a reader asks
    source = ParquetImages(tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    assert len(source.read(1999)) == 1 << 20
    assert pa.total_allocated_bytes() - before < 64 << 20


def test_files_with_mistakes(tmp_path, monkeypatch):
    (tmp_path / "text.parquet").write_bytes(b"no parquet" * 100)
    with pytest.raises(DataError, match="text.parquet isn't a readable Parquet file .*; copy or write it again"):
        ParquetImages(tmp_path / "text.parquet")
    with pytest.raises(DataError, match="matches no file"):
        ParquetImages(tmp_path / "none.parquet")
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has 0 columns that may be images .a, b.; give files with a column of bytes"):
        ParquetImages(tmp_path / "a.parquet")
    parquet_of([], tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="empty.parquet holds no rows; give Parquet files with images"):
        ParquetImages(tmp_path / "empty.parquet")
    parquet_of(IMAGES[:2], tmp_path / "labels.parquet", labels=[0, 2], names=["a", "b"])
    with pytest.raises(DataError, match="label 2, but 2 class names; write the file again"):
        ParquetImages(tmp_path / "labels.parquet")
    parquet_of(IMAGES[:2], tmp_path / "mixed.parquet", labels=["1", "x"])
    with pytest.raises(DataError, match="labels '1' and 'x'; use either only numbers or only names .rows 0 and 1"):
        ParquetImages(tmp_path / "mixed.parquet")
    path = parquet_of(IMAGES[:2], tmp_path / "b.parquet")
    source = ParquetImages(path)
    parquet_of(IMAGES[:3], path)
    with pytest.raises(DataError, match="b.parquet has changed since it was listed"):
        source.read(0)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(DataError, match="has row groups of over 100 bytes of images, .* smaller ones .row_group_size"):
        ParquetImages(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"--from parquet needs pyarrow; pip install 'ijepa_scale\[parquet\]'"):
        ParquetImages(path)


def test_metadata_of_others_is_no_names(tmp_path):
    for content in (b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'):
        table = pa.table({"image": pa.array(IMAGES[:2]), "label": [0, 1]}).replace_schema_metadata(
            {"huggingface": content}
        )
        pq.write_table(table, tmp_path / "a.parquet")
        assert ParquetImages(tmp_path / "a.parquet").classes is None
    assert np.array_equal(ParquetImages(tmp_path / "a.parquet").labels(), [0, 1])
