"""Plain webdataset streaming: what it delivers, its limits, and how it reports bad shards."""

from __future__ import annotations

import io
import itertools
import tarfile

import numpy as np
import pytest

from ijepa_scale.config import DataConfig
from ijepa_scale.config.data import AugmentConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.open import training_order, training_source
from ijepa_scale.data.sources.stream import StreamOrder, StreamSource
from ijepa_scale.errors import DataError
from tests.unit.data.flaky_server import FlakyServer, serving
from tests.unit.data.test_data_loader import crops, jpeg


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    write_shards([Sample(f"{n:03d}", jpeg(n), n % 5) for n in range(60)], folder, shard_bytes=9_000)
    assert len(list(folder.glob("*.tar"))) >= 5
    return folder


def a_loader(source, *, rank=0, world=1, workers=0, steps=20, start=0, max_bad_fraction=0.001):
    order = StreamOrder(4 * world, steps_per_epoch=15)
    return TrainLoader(
        source, order, AugmentConfig(), (8, 8), seed=1, rank=rank, world=world, workers=workers,
        start_step=start, stop_step=start + steps, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip


def names(source, part, parts, count, start=0):
    return [sample.name for sample in itertools.islice(source.stream(0, start, part, parts), count)]


def test_a_pass_of_all_readers_is_the_set_once(shards):
    source = StreamSource(str(shards), shuffle=1)
    for parts in (1, 2, 5):
        seen = []
        for part in range(parts):
            first = itertools.takewhile(lambda sample: sample.pass_number == 0, source.stream(0, 0, part, parts))
            seen += [sample.name for sample in first]
        assert len(seen) == 60 == len(set(seen))


def test_batches_are_decoded_labelled_and_repeatable(shards):
    first, again = (list(crops(a_loader(StreamSource(str(shards))))) for _ in range(2))
    assert first == again and len(first) == 80
    batch = next(iter(a_loader(StreamSource(str(shards)))))
    assert batch.epoch == 0 and set(batch.labels.tolist()) <= set(range(5)) and (batch.sample_ids >= 0).all()
    loader = a_loader(StreamSource(str(shards)))
    assert list(crops(loader)) == list(crops(loader))  # iterating again restarts the stream
    other = list(crops(a_loader(StreamSource(str(shards)), start=5)))
    assert other != first  # a resumed run starts new passes
    assert [b.epoch for b in a_loader(StreamSource(str(shards)), steps=31)][::15] == [0, 1, 2]


def test_workers_and_processes_read_different_samples(shards):
    source = StreamSource(str(shards))
    both = [{s for s, _, _ in crops(a_loader(source, rank=r, world=2, steps=5))} for r in (0, 1)]
    assert not both[0] & both[1]
    assert len(list(crops(a_loader(source, workers=2, steps=10)))) == 40


def test_shuffling_mixes_shards(shards):
    plain, mixed = (names(StreamSource(str(shards), shuffle=n), 0, 1, 30) for n in (1, 40))
    assert len({name.rpartition(":")[0] for name in plain[:8]}) <= 2
    assert len({name.rpartition(":")[0] for name in mixed[:8]}) >= 3


def test_from_a_server(shards):
    count = len(list(shards.glob("*.tar")))
    with serving(FlakyServer(shards)) as address:
        pattern = f"{address}/shard-{{000000..{count - 1:06d}}}.tar"
        remote = names(StreamSource(pattern, shuffle=1), 0, 1, 60)
    local = names(StreamSource(str(shards), shuffle=1), 0, 1, 60)
    assert [name.rpartition("/")[2] for name in remote] == [name.rpartition("/")[2] for name in local]


def test_a_shard_that_breaks_off_costs_its_rest_only(shards):
    tars = sorted(shards.glob("*.tar"))
    tars[0].write_bytes(tars[0].read_bytes()[:4000])
    source = StreamSource(str(shards), shuffle=1)
    loader = a_loader(source, steps=60, max_bad_fraction=0.2)
    assert len(list(crops(loader))) == 240 and loader.bad["cut short"] >= 1
    with pytest.raises(DataError, match="x cut short.*over data.max_bad_fraction 0"):
        list(crops(a_loader(source, steps=60, max_bad_fraction=0)))


def test_unusable_samples_are_counted_by_kind(tmp_path, shards):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (
            ("a.cls", b"1"),
            ("b.jpg", b"x"),
            ("c.jpg", jpeg(1)),
            ("c.cls", b"\xff"),
            ("d.jpg", jpeg(1)),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        big = tarfile.TarInfo("e.jpg")
        big.size = 0
        tar.addfile(big)
    loader = a_loader(StreamSource(str(tmp_path / "a.tar")), steps=1, max_bad_fraction=1.0)
    batch = next(iter(loader))
    assert set(loader.bad) == {"no image", "not decodable", "bad label", "member size"}
    assert len(batch) == 4 and len(set(batch.sample_ids.tolist())) == 4  # one sample from each of four passes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: StreamSource("pipe:cat a.tar"), "'pipe:cat a.tar' would run a shell .*data.allow_pipe=true"),
        (lambda s: StreamSource("ftp://host/a.tar"), "has the scheme 'ftp'"),
        (lambda s: StreamSource(str(s / "no.tar")), "matches no file"),
        (lambda s: a_loader(StreamSource(str(s)), world=4, workers=3), "for 4 processes x 3 workers; each"),
        (lambda s: StreamOrder(6, 10).part_size(4), "batch 6 is not divisible by 4 processes; try 8"),
        (lambda s: training_source(DataConfig(batch_size=4, reader="stream"), (8, 8)), "reader 'stream' has no data"),
        (
            lambda s: training_order(
                DataConfig(batch_size=4), StreamSource(str(s)), 4, seed=0, steps_per_epoch=None
            ),
            "no known length; give schedule.steps_per_epoch",
        ),
        (
            lambda s: training_source(DataConfig(batch_size=4, train="https://host/{0..3}.tar"), (8, 8)),
            "is remote and data.cache is null",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(shards, make, message):
    with pytest.raises(DataError, match=message):
        make(shards)


def test_a_shard_that_disappears_is_named(shards):
    source = StreamSource(str(shards), shuffle=1)
    for tar in shards.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=r"shard .*tar can't be read \(No such file"):
        next(iter(a_loader(source)))


def test_shards_without_a_sample_end_the_run(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    with pytest.raises(DataError, match="a pass over the shards of reader 0 found no sample"):
        next(iter(a_loader(StreamSource(str(tmp_path / "a.tar")))))


def test_too_many_bad_samples_in_a_row_end_the_run(tmp_path):
    write_shards([Sample(f"{n}", b"\xff\xd8\xff broken", 0) for n in range(50)], tmp_path / "s")
    with pytest.raises(DataError, match="met 33 bad samples before 4 good ones"):
        next(iter(a_loader(StreamSource(str(tmp_path / "s")), max_bad_fraction=1.0)))


def test_pipe_runs_where_it_is_allowed(shards):
    tar = sorted(shards.glob("*.tar"))[0]
    piped = names(StreamSource(f"pipe:cat {tar}", allow_pipe=True, shuffle=1), 0, 1, 5)
    assert [name.rpartition(":")[2] for name in piped] == ["000", "001", "002", "003", "004"]


def test_configurations_reach_every_reader(shards, tmp_path):
    local = training_source(DataConfig(batch_size=4, train=str(shards)), (8, 8))
    assert local.summary().startswith("60 images in ")
    with serving(FlakyServer(shards)) as address:
        config = {"batch_size": 4, "train": address, "cache": str(tmp_path / "c"), "window_shards": 1}
        remote = training_source(DataConfig(**config), (8, 8))
        assert remote.fingerprint == local.fingerprint
        with pytest.raises(DataError, match="but two windows of 8 shards need"):
            training_source(DataConfig(**{**config, "window_shards": 8, "cache_gb": 1e-6}), (8, 8))
    stream = training_source(DataConfig(batch_size=4, train=str(shards), reader="stream"), (8, 8))
    assert stream.summary().startswith("a stream of ") and not stream.problems().counts
    order = training_order(DataConfig(batch_size=4), stream, 4, seed=0, steps_per_epoch=7)
    assert (order.epoch(13), order.part_size(2)) == (1, 2)
    assert np.array_equal(
        training_order(DataConfig(batch_size=4), local, 4, seed=0, steps_per_epoch=None).part(0, 0, 1),
        training_order(DataConfig(batch_size=4), remote, 4, seed=0, steps_per_epoch=None).part(0, 0, 1),
    )
