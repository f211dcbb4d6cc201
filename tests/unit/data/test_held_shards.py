"""Shards against their manifest: what is lost is counted, and what changes is replaced, the same on all processes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil

import numpy as np
import pytest

from ijepa_scale.config.data import DataConfig
from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.eval_reader import EvalReader
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources import hashes, tar_shards
from ijepa_scale.data.sources.hashes import HashedShards
from ijepa_scale.data.sources.open import build_source, training_source
from ijepa_scale.data.sources.source import check_problems, check_whole
from ijepa_scale.data.sources.stream import StreamSource
from ijepa_scale.data.sources.tar_index import index_path
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError, ShardError
from launch import shards as command
from tests.unit.data.test_data_loader import crops, jpeg


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    found = write_shards([Sample(f"{n:03d}", jpeg(n), n % 5) for n in range(60)], folder, shard_bytes=12_000)
    assert len(found) > 5
    return found


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """Puts the notes on hashes into the test's folder."""
    monkeypatch.setattr(hashes.tempfile, "gettempdir", lambda: str(tmp_path))


def rows_of(shards):
    return {row["name"]: row for row in json.loads((shards[0].parent / "manifest.json").read_text())["shards"]}


def opened(folder, **options):
    data = DataConfig(reader="shards", train=str(folder), batch_size=4, **options)
    return training_source(data, (8, 8))


def empty(path):
    path.write_bytes(b"")


def other_size(path):
    path.write_bytes(path.read_bytes() + bytes(10240))


def not_a_tar(path):
    path.write_bytes(b"x" * 2000)


DAMAGE = {
    "missing shard": os.unlink,
    "empty shard": empty,
    "changed shard": other_size,
    "unreadable shard": not_a_tar,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("pattern", ["", "shard-*.tar"])
def test_a_lost_shard_counts_as_the_samples_that_the_manifest_counts(shards, kind, pattern):
    victim = shards[2]
    samples = rows_of(shards)[victim.name]["samples"]
    DAMAGE[kind](victim)
    source = opened(shards[0].parent / pattern)
    problems = source.problems()
    assert problems.counts == {kind: samples} and source.num_samples == 60 - samples
    assert [problem.name for problem in problems.named] == [str(victim)]
    with pytest.raises(DataError, match=f"^{samples} of 60 samples can't be used: {samples} x {kind}; the first is .*"):
        check_problems(problems, source.num_samples, 0.001)
    check_problems(problems, source.num_samples, samples / 60)
    assert len({source.read(n) for n in range(source.num_samples)}) == 60 - samples


@pytest.mark.parametrize("kind", ["missing shard", "empty shard"])
def test_info_and_stats_count_what_is_lost(shards, kind, capsys):
    folder, victim = shards[0].parent, shards[2]
    samples = rows_of(shards)[victim.name]["samples"]
    DAMAGE[kind](victim)
    assert command.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"problems          {samples} x {kind}\n" in out and str(victim) in out
    assert f"images            {60 - samples} of " in out
    arguments = ["stats", str(folder), "--workers", "0"]
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert f"{samples} of 60 samples can't be used: {samples} x {kind}" in said and "over --max-bad-fraction 0" in said
    assert not (folder / "pixel_stats.json").exists()
    assert command.main([*arguments, "--max-bad-fraction", "0.5"]) == 0
    assert json.loads((folder / "pixel_stats.json").read_text())["images"] == 60 - samples


def test_info_counts_what_a_cut_shard_has_lost(shards, capsys):
    os.truncate(shards[3], shards[3].stat().st_size // 2)
    assert command.main(["info", str(shards[0].parent)]) == 0
    counts = opened(shards[0].parent).problems().counts
    shown = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    assert counts.total() > 1 and f"problems          {shown}\n" in capsys.readouterr().out


def test_a_shard_that_the_pattern_does_not_mean_is_not_missed(shards):
    shards[-1].unlink()
    for pattern in (
        shards[0],
        f"{shards[0].parent}/shard-00000[0-1].tar",
        f"{shards[0].parent}/shard-{{000000..000001}}.tar",
    ):
        assert not opened(pattern).problems().counts


def test_an_empty_shard_without_a_manifest_counts_like_an_average_one(shards):
    os.unlink(shards[0].parent / "manifest.json")
    empty(shards[1])
    source = opened(shards[0].parent)
    average = round(source.num_samples / (len(shards) - 1))
    assert source.problems().counts == {"empty shard": average} and average > 5
    assert f"{shards[1]} (0 bytes, counted like an average shard of {average} samples" in source.problems().summary()


def test_a_cut_shard_costs_what_it_has_lost(shards):
    samples = rows_of(shards)[shards[3].name]["samples"]
    os.truncate(shards[3], shards[3].stat().st_size // 2)
    source = opened(shards[0].parent)
    counts = source.problems().counts
    kept = source.shard_sizes[3]
    assert 0 < kept < samples and counts.total() == samples - kept and set(counts) >= {"cut short"}
    assert len(source.problems().named) == len(counts)  # one line each, not one for each sample


def test_a_shard_that_the_manifest_does_not_name_is_told(shards, caplog):
    shutil.copy(shards[0], shards[0].parent / "extra.tar")
    source = opened(shards[0].parent)
    with caplog.at_level(logging.WARNING):
        check_problems(source.problems(), source.num_samples, 0.0)
    assert "manifest.json doesn't name 1 shard, like extra.tar, which is read unchecked" in caplog.text


def test_a_manifest_of_something_else_is_told_and_a_damaged_one_refused(shards, caplog):
    path = shards[0].parent / "manifest.json"
    path.write_text('{"name": "my site"}')
    assert 'says nothing about shards (it has no list "shards")' in opened(path.parent).problems().doubts[0]
    for rows in (["a.tar", "b.tar"], [{"name": "a.tar", "samples": 3}], [{"name": 7}], [None]):
        path.write_text(json.dumps({"version": 1, "shards": rows}))
        source = opened(path.parent)
        assert source.num_samples == 60 and "hasn't name, bytes, samples and sha256" in source.problems().doubts[0]
    for text, said in (
        ("{", "Expecting"),
        ('{"shards": [{"name": "../x.tar", "bytes": 1, "samples": 1, "sha256": "0"}]}', "not the name of a file"),
        ('{"version": 1, "samples": 9, "shards": [{"name": "x.tar"}]}', "is None, not a whole number"),
        ('{"shards": [{"name": "x.tar", "bytes": 1, "samples": -1, "sha256": "0"}]}', "not a whole number from 0"),
    ):
        path.write_text(text)
        with pytest.raises(
            DataError, match=f"manifest.json isn't a manifest of shards .*{said}.*; copy it again, or r"
        ):
            opened(path.parent)


def test_evaluation_never_reads_a_part_of_a_set(shards):
    shards[1].unlink()
    source = build_source("shards", shards[0].parent)
    with pytest.raises(
        DataError, match="x missing shard.*; an evaluation set must be complete, or .*: fix the data"
    ) as said:
        check_whole(source)
    assert "limit" not in str(said.value) and "max_bad" not in str(said.value)
    whole = ShardSource(shards[2:])
    reader = iter(EvalReader(whole, (8, 8), ids=np.arange(whole.num_samples), batch_size=4))
    next(reader)
    other_size(shards[-1])
    with pytest.raises(DataError, match="sample .*: shard .* has changed since it was indexed"):
        list(reader)


def flip(path):
    """Changes one byte of an image and leaves size and time as they were; returns the offset."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def a_loader(source, **options):
    order = SampleOrder(source.shard_sizes, 8, 1, 2)
    options = {"seed": 1, "stop_step": 2 * order.steps_per_epoch, "max_bad_fraction": 1.0, **options}
    return TrainLoader(source, order, AugmentConfig(), (8, 8), **options)


@pytest.mark.parametrize("change", [flip, other_size, os.unlink])
def test_samples_of_a_changed_shard_are_replaced_alike_everywhere(shards, change, caplog):
    source = opened(shards[0].parent)
    change(shards[2])
    with caplog.at_level(logging.WARNING):
        alone = a_loader(source)
        expected = crops(alone)
    lost = set(range(*np.cumsum(source.shard_sizes)[1:3]))
    seen = [sample for sample, _, _ in expected]
    assert not lost & set(seen) and len(seen) == 2 * 56
    assert alone.num_bad > 8 and set(alone.bad) == {"missing shard" if change is os.unlink else "changed shard"}
    said = [record.getMessage() for record in caplog.records]
    assert (
        len(said) == 1 and said[0].startswith(f"shard {shards[2]} ") and "put it back" in said[0] or "again" in said[0]
    )
    for world, workers in ((2, 0), (4, 0), (1, 2)):
        loaders = [a_loader(source, rank=rank, world=world, workers=workers) for rank in range(world)]
        assert crops(batch for step in zip(*loaders, strict=True) for batch in step) == expected
        assert sum(loader.num_bad for loader in loaders) == alone.num_bad
    resumed = a_loader(source, start_step=5)
    assert crops(resumed) == expected[5 * 8 :]


def test_by_default_a_changed_shard_ends_the_run_in_one_line(shards):
    source = opened(shards[0].parent)
    other_size(shards[2])
    loader = a_loader(source, stop_step=400, max_bad_fraction=0.001)
    with pytest.raises(DataError, match=r"x changed shard.*over data.max_bad_fraction 0.001; the last is .* \(shard"):
        list(loader)


def test_a_shard_rewritten_in_place_while_it_is_open_is_noticed(shards):
    source = opened(shards[0].parent)
    source.read(0)
    content = bytearray(shards[0].read_bytes())
    content[700] ^= 255
    with shards[0].open("r+b") as file:
        file.write(content)
    with pytest.raises(ShardError, match="written at another time"):
        source.read(1)


def test_reading_ahead_leaves_errors_to_the_read(shards):
    source = opened(shards[0].parent)
    shards[0].unlink()
    tar_shards._read_ahead(shards[:2], {path: source._rows[path] for path in shards[:2]}, source._hashed)
    assert [path for path, _ in source._hashed._known] == [str(shards[1])]


def test_only_sizes_are_compared_if_so_chosen(shards):
    flip(shards[0])
    assert opened(shards[0].parent, verify="size").read(0)
    with pytest.raises(ShardError, match=r"differs from manifest.json in its SHA-256, so it was damaged or replaced"):
        opened(shards[0].parent).read(0)


def test_a_shard_is_hashed_once_per_run_and_machine(shards, monkeypatch):
    hashed = []
    original = HashedShards._hash
    monkeypatch.setattr(HashedShards, "_hash", lambda *args, **kw: (hashed.append(1), original(*args, **kw))[1])
    sources = [opened(shards[0].parent) for _ in range(3)]  # as in three processes
    for source in sources:
        for sample in range(60):
            source.read(sample)
    assert len(hashed) == len(shards)
    flip(shards[0])  # after the note was written; the times of the file tell
    for source in sources:
        with pytest.raises(ShardError):
            source._files.clear()
            source.read(0)
    assert len(hashed) == len(shards) + 1
    later = opened(shards[0].parent)  # a run that begins now doesn't trust what is noted
    later.read(59)
    assert len(hashed) == len(shards) + 2


@pytest.fixture
def said(monkeypatch, caplog):
    """Returns a function that returns what was logged about notes, as in a process of its own."""
    monkeypatch.setattr(hashes, "_said", [])
    return lambda: [text for record in caplog.records if "can't be noted" in (text := record.getMessage())]


def test_notes_that_others_could_write_are_not_used(shards, tmp_path, said):
    flip(shards[0])
    folder = tmp_path / f"ijepa-scale-{os.geteuid()}" / "hashed"
    folder.mkdir(parents=True)
    os.chmod(folder, 0o777)
    source = opened(shards[0].parent)
    for sample in (0, 1, 59):
        with contextlib.nullcontext() if sample == 59 else pytest.raises(ShardError):
            source.read(sample)
    assert not list(folder.iterdir())
    (line,) = said()
    assert f"{folder} (other users can write to {folder}), so each process hashes every shard itself" in line


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_without_locks_each_process_hashes_and_says_so(shards, monkeypatch, said, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hashes.fcntl, "flock", refuse)
    flip(shards[0])
    source = opened(shards[0].parent)
    with pytest.raises(ShardError, match="differs from"):
        source.read(0)
    assert source.read(59)
    source._hashed.accept(shards[1], (1,), "0")
    (line,) = said()
    assert f"({os.strerror(code)})" in line


def test_an_interrupted_hash_leaves_no_result(shards, monkeypatch):
    """What is noted of an earlier run doesn't look like that of this one, though the note was touched."""
    opened(shards[0].parent).read(0)
    later = opened(shards[0].parent)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(hashes, "show_work", interrupt)
        later.read(0)
    hashed = []
    original = HashedShards._hash
    monkeypatch.setattr(HashedShards, "_hash", lambda *args, **kw: (hashed.append(1), original(*args, **kw))[1])
    later.read(0)
    assert hashed == [1]


def interrupt():
    raise KeyboardInterrupt


def test_who_waits_for_a_hash_shows_work_while_it_goes_on(shards, monkeypatch):
    hashed, shown = HashedShards(), []
    monkeypatch.setattr(hashes, "show_work", lambda: shown.append(1))
    note = hashed._open_note(shards[0])
    hashed._wait(note)
    assert not shown
    monkeypatch.setattr(hashes.time, "sleep", lambda _: os.utime(note))
    hashed._wait(note)
    os.close(note)
    assert shown == [1]


def test_hashing_ahead_leaves_a_file_to_the_process_that_hashes_it(shards):
    hashed = HashedShards()
    descriptor = os.open(shards[0], os.O_RDONLY)
    note = hashed._open_note(shards[0])
    import fcntl

    fcntl.flock(note, fcntl.LOCK_EX)
    hashed.hash_ahead(shards[0], descriptor, (1,), "0")  # returns at once
    assert not hashed._known
    os.close(note)
    hashed.hash_ahead(shards[0], descriptor, (1,), "0")
    assert list(hashed._known.values()) == [False]
    os.close(descriptor)


def test_a_stream_counts_what_its_manifest_misses(shards):
    rows = rows_of(shards)
    shards[1].unlink()
    empty(shards[2])
    other_size(shards[3])
    source = opened(shards[0].parent)
    lost = {kind: rows[shards[n].name]["samples"] for kind, n in (("missing shard", 1), ("empty shard", 2))}
    lost["changed shard"] = rows[shards[3].name]["samples"]
    assert source.problems().counts == lost
    stream = StreamSource(str(shards[0].parent))
    assert stream.problems().counts == lost and stream.num_counted == source.num_samples


def test_indices_are_not_needed(shards):
    for shard in shards:
        index_path(shard).unlink()
    assert not opened(shards[0].parent).problems().counts
