"""Remote shards from a failing server: every sample is read once, each file is fetched once, the cache is bounded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ijepa_scale.config.schema import AugmentConfig
from ijepa_scale.data.loader import TrainLoader
from ijepa_scale.data.order import SampleOrder
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources import fetch as fetch_module
from ijepa_scale.data.sources.cache import FileCache, RemoteFile
from ijepa_scale.data.sources.fetch import Retry, fetch, file_sha256, remote_size
from ijepa_scale.data.sources.remote import RemoteShardSource, open_cache
from ijepa_scale.data.sources.tar_index import index_path
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import DataError
from tests.unit.data.flaky_server import FAULTS, FlakyServer, serving
from tests.unit.data.test_data_loader import crops, jpeg

# Transfers are counted below, so a healthy answer must never time out, however busy the machine is; a stalling server
# closes its connection itself, and the timeout has its own test.
QUICK = Retry(attempts=25, first_pause_s=0.005, longest_pause_s=0.02, timeout_s=60)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    write_shards([Sample(f"{n:03d}", jpeg(n), n % 5) for n in range(60)], folder, shard_bytes=9_000)
    assert len(list(folder.glob("*.tar"))) >= 5
    return folder


def a_cache(folder: Path, megabytes: float = 100, **options) -> FileCache:
    return FileCache(folder, int(megabytes * 1e6), QUICK, **options)


def a_loader(source, workers=0):
    order = SampleOrder(source.shard_sizes, 6, 1, 2)
    steps = 2 * order.steps_per_epoch
    return TrainLoader(source, order, AugmentConfig(), (8, 8), seed=1, stop_step=steps, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_flaky_server_delivers_every_sample_once(shards, tmp_path, workers, with_index):
    if not with_index:
        for tar in shards.glob("*.tar"):
            index_path(tar).unlink()
    local = list(crops(a_loader(ShardSource(sorted(shards.glob("*.tar"))))))
    server = FlakyServer(shards, FAULTS, probability=0.4, seed=workers)
    with serving(server) as address:
        source = RemoteShardSource(address, a_cache(tmp_path / "cache"))
        delivered = list(crops(a_loader(source, workers)))
    assert delivered == local  # the same samples in the same order, the same pixels
    first_pass = [sample for sample, _, _ in delivered[:60]]
    assert sorted(first_pass) == list(range(60))
    assert source.fingerprint == ShardSource(sorted(shards.glob("*.tar"))).fingerprint
    assert sum(server.failed.values()) >= 5
    assert {count for path, count in server.sent.items() if path.endswith(".tar")} == {1}


def test_without_a_manifest_the_servers_size_is_checked(shards, tmp_path):
    count = len(list(shards.glob("*.tar")))
    (shards / "manifest.json").unlink()
    server = FlakyServer(shards, ("503", "drop", "cut"), probability=0.4)
    with serving(server) as address:
        source = RemoteShardSource(f"{address}/shard-{{000000..{count - 1:06d}}}.tar", a_cache(tmp_path / "cache"))
        assert len(list(crops(a_loader(source)))) == 120
        assert source.name(0).startswith(f"{address}/shard-000000.tar:")
        with pytest.raises(DataError, match="manifest.json doesn't exist, but a remote folder needs it; .* shards"):
            RemoteShardSource(address, a_cache(tmp_path / "cache"))


def test_class_names_are_fetched(shards, tmp_path):
    (shards / "classes.json").write_text(json.dumps(list("abcde")))
    with serving(FlakyServer(shards)) as address:
        assert RemoteShardSource(address, a_cache(tmp_path / "c")).classes == list("abcde")
        (shards / "classes.json").write_text('{"a": 1}')
        with pytest.raises(DataError, match="classes.json isn't a list of class names .*; write it again, or remove"):
            RemoteShardSource(address, a_cache(tmp_path / "c"))
    with pytest.raises(DataError, match="classes.json isn't a list of class names"):
        ShardSource(sorted(shards.glob("*.tar")))


def test_a_missing_file_is_reported_at_once(shards, tmp_path):
    with serving(FlakyServer(shards)) as address:
        begin = time.monotonic()
        with pytest.raises(DataError, match="no.tar can't be fetched .*; check the address and the permissions"):
            fetch(f"{address}/no.tar", tmp_path / "x", size=None, sha256=None, retry=Retry(), largest=10)
        with pytest.raises(DataError, match="secret.tar can't be fetched .*403"):
            remote_size(f"{address}/secret.tar", Retry())
        assert time.monotonic() - begin < 5  # it isn't retried, with pauses of a second and more


def test_a_persistent_fault_ends_in_a_clear_error(shards, tmp_path):
    retry = Retry(attempts=3, first_pause_s=0.001, timeout_s=0.2)
    tar = sorted(shards.glob("*.tar"))[0]
    size, to = tar.stat().st_size, tmp_path / "x"
    cases = {"503": "503", "cut": "", "stall": "", "garbage": "SHA-256 differs from the manifest's"}
    for fault, reason in cases.items():
        with serving(FlakyServer(shards, (fault,), probability=1.0)) as address:
            with pytest.raises(DataError, match=f"couldn't be fetched in 3 attempts .*{reason}.*; check the server"):
                fetch(f"{address}/{tar.name}", to, size=size, sha256=file_sha256(tar), retry=retry, largest=size)
        assert not to.exists()
    with serving(FlakyServer(shards)) as address:
        with pytest.raises(DataError, match="received over 100 bytes"):
            fetch(f"{address}/{tar.name}", to, size=None, sha256=None, retry=retry, largest=100)
        with pytest.raises(DataError, match=f"received {size} bytes instead of {size + 1}"):
            fetch(f"{address}/{tar.name}", to, size=size + 1, sha256=None, retry=retry, largest=size + 1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/a.tar", "has the scheme 'ftp'; use a local path, or one of https, http, s3, gs, hf"),
        ("http://example.org/a.tar", "is unencrypted; use https"),
        ("pipe:cat a.tar", "has the scheme None"),
    ],
)
def test_addresses_that_are_not_fetched(tmp_path, address, message):
    with pytest.raises(DataError, match=message):
        RemoteShardSource(address, a_cache(tmp_path))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(DataError, match="s3://bucket/a.tar needs s3fs .*; install it with pip"):
        remote_size("s3://bucket/a.tar", QUICK)


@pytest.mark.parametrize("url", ["https://a/b.tar", "s3://a/b.tar", "gs://a/b.tar"])
def test_no_transfer_waits_for_ever(url, monkeypatch):
    given = {}
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url, **options: (given.update(options), "")[::1])
    fetch_module._filesystem(url, Retry(timeout_s=7.5))
    found = json.dumps(given, default=lambda value: vars(value) if hasattr(value, "__dict__") else str(value))
    assert found.count("7.5") == 2  # to connect, and to read


class Answered(Exception):
    """An error as requests, aiohttp and botocore raise it: each stores the status in another attribute."""

    def __init__(self, library, status):
        super().__init__(f"status {status}")
        if library == "aiohttp":
            self.status = status
        elif library == "botocore":
            self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
        else:
            self.response = type("Response", (), {"status_code": status})()


@pytest.mark.parametrize("library", ["aiohttp", "botocore", "requests"])
@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (429, 3), (503, 3)])
def test_which_answers_are_final(monkeypatch, library, status, tries):
    asked = []

    def answer(url, **options):
        asked.append(url)
        raise Answered(library, status)

    monkeypatch.setattr("fsspec.core.url_to_fs", answer)
    with pytest.raises(DataError, match=f"status {status}"):
        remote_size("s3://bucket/a.tar", Retry(attempts=3, first_pause_s=0.001))
    assert len(asked) == tries


def test_a_run_names_its_cache():
    with pytest.raises(DataError, match="'s3://b/x' is remote and data.cache is null; name a folder .*data.cache=DIR"):
        open_cache(None, 1.0, "s3://b/x")


def read_all(cache: FileCache, files: list[RemoteFile], pipe) -> None:
    found = []
    for file in files:
        handle = cache.open(file)
        found.append(os.pread(handle.descriptor, 1 << 20, 0))
        handle.close()
    pipe.send(found)


def test_processes_share_one_transfer(shards, tmp_path):
    server = FlakyServer(shards)
    server.seconds_per_answer = 0.05
    names = [tar.name for tar in sorted(shards.glob("*.tar"))]
    with serving(server) as address:
        files = [RemoteFile(f"{address}/{name}") for name in names]
        pipes = [FORK.Pipe() for _ in range(3)]
        runs = [FORK.Process(target=read_all, args=(a_cache(tmp_path / "c"), files, pipe[1])) for pipe in pipes]
        for run, pipe in zip(runs, pipes, strict=True):
            run.start()
            pipe[1].close()  # so that a run that fails ends the wait for what it found
        found = [pipe[0].recv() for pipe in pipes]
        for run in runs:
            run.join()
    assert found == [[(shards / name).read_bytes() for name in names]] * 3
    assert dict(server.sent) == {f"/{name}": 1 for name in names}


def taken(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.glob("*.tar"))


def test_the_bound_holds_and_files_in_use_stay(shards, tmp_path):
    tars = sorted(shards.glob("*.tar"))
    sizes = [tar.stat().st_size for tar in tars]
    bound = max(sizes) * 3
    cache = FileCache(tmp_path / "c", bound, QUICK, wait_s=0.3)
    with serving(FlakyServer(shards)) as address:
        files = [RemoteFile(f"{address}/{tar.name}") for tar in tars]
        held = cache.open(files[0])
        for file in files[1:] + files[1:]:
            cache.open(file).close()
            assert taken(cache.folder) <= bound and cache.has(files[0].url)
        assert os.pread(held.descriptor, 1 << 20, 0) == tars[0].read_bytes()
        more = [cache.open(file) for file in files[1:3]]
        with pytest.raises(DataError, match="is full of files in use, and .* raise data.cache_gb, or lower"):
            for file in files[3:]:
                more.append(cache.open(file))
        held.close()
        cache.open(files[3]).close()
        assert not cache.has(files[0].url)  # the least recently opened one
        for handle in more:
            handle.close()
        tiny = FileCache(tmp_path / "d", 10, QUICK)
        with pytest.raises(DataError, match="GiB, the cache only 0.00; raise data.cache_gb"):
            tiny.open(files[0])
        source = RemoteShardSource(address, cache)
        with pytest.raises(DataError, match="but two windows of 4 shards need .*; raise it, or lower"):
            source.check_room(4)


def test_a_killed_transfer_leaves_the_cache_sound(shards, tmp_path):
    server = FlakyServer(shards)
    server.seconds_per_answer = 30.0
    tar = sorted(shards.glob("*.tar"))[0]
    cache = a_cache(tmp_path / "c", megabytes=1.5 * tar.stat().st_size / 1e6)
    cache.retry = Retry(timeout_s=60)
    with serving(server) as address:
        file = RemoteFile(f"{address}/{tar.name}", tar.stat().st_size)
        run = FORK.Process(target=read_all, args=(cache, [file], None))
        run.start()
        while not list(cache.folder.glob("*.part")):
            assert run.is_alive()
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        server.seconds_per_answer = 0.0
        other = RemoteFile(f"{address}/{sorted(shards.glob('*.tar'))[1].name}")
        assert not cache.has(file.url)
        for wanted in (other, file):  # the reservation of the killed process doesn't count any more
            cache.open(wanted).close()
    assert not [entry for entry in cache.folder.iterdir() if entry.suffix in (".part", ".new")]


def nfs_flock(lock: int, operation: int) -> None:
    """As NFS has it, by locks on bytes: raising a shared one keeps it while it waits."""
    kind = {fcntl.LOCK_SH: fcntl.F_RDLCK, fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_UN: fcntl.F_UNLCK}
    command = _OFD_SETLK if operation & fcntl.LOCK_NB else _OFD_SETLKW
    fcntl.fcntl(lock, command, struct.pack("hhqqi4x", kind[operation & ~fcntl.LOCK_NB], 0, 0, 0, 0))


_OFD_SETLK, _OFD_SETLKW = 37, 38  # Linux; Python 3.10 has no names for them


def opened_over_nfs(cache: FileCache, file: RemoteFile, both: Any) -> None:
    def flock(lock: int, operation: int) -> None:
        nfs_flock(lock, operation)
        if operation == fcntl.LOCK_SH and not both.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(5)  # both look for the file while both have the shared lock

    fcntl.flock = flock
    cache.open(file).close()


def test_processes_that_want_one_file_over_nfs_do_not_wait_for_each_other(shards, tmp_path):
    server = FlakyServer(shards)
    tar = sorted(shards.glob("*.tar"))[0]
    both = FORK.Barrier(2)
    with serving(server) as address:
        arguments = (a_cache(tmp_path / "c"), RemoteFile(f"{address}/{tar.name}", tar.stat().st_size), both)
        runs = [FORK.Process(target=opened_over_nfs, args=arguments, daemon=True) for _ in range(2)]
        for run in runs:
            run.start()
        for run in runs:
            run.join(60)
        codes = [run.exitcode for run in runs]
        for run in runs:
            run.kill()
    assert codes == [0, 0] and dict(server.sent) == {f"/{tar.name}": 1}


def test_equal_names_of_other_addresses_do_not_collide(tmp_path):
    for folder, content in (("a", b"1"), ("b", b"22")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(content)
    cache = a_cache(tmp_path / "c")
    with serving(FlakyServer(tmp_path)) as address:
        handles = [cache.open(RemoteFile(f"{address}/{folder}/x.tar")) for folder in "ab"]
        assert [os.pread(handle.descriptor, 9, 0) for handle in handles] == [b"1", b"22"]
        for handle in handles:
            handle.close()


def test_a_manifest_may_name_shards_in_folders(shards, tmp_path):
    (shards / "train").mkdir()
    manifest = json.loads((shards / "manifest.json").read_text())
    for row in manifest["shards"]:
        (shards / row["name"]).rename(shards / "train" / row["name"])
        row["name"] = f"train/{row['name']}"
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with serving(FlakyServer(shards)) as address:
        source = RemoteShardSource(address, a_cache(tmp_path / "c"))
        assert source.num_samples == 60 and source.read(59)
        assert [file.size for file in source._remote] == [row["bytes"] for row in manifest["shards"]]
        manifest["shards"][0]["name"] = "train/../x.tar"
        (shards / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="'train/../x.tar', not the name of a file"):
            RemoteShardSource(address, a_cache(tmp_path / "d"))


def test_a_file_that_is_not_a_manifest_is_refused(shards, tmp_path):
    for text in ("text", "{}", json.dumps({"shards": [{"name": "x"}]})):
        (shards / "manifest.json").write_text(text)
        with serving(FlakyServer(shards)) as address:
            with pytest.raises(DataError, match="isn't a manifest of shards .*; write it again"):
                RemoteShardSource(address, a_cache(tmp_path / "c"))
    (shards / "manifest.json").write_text('{"shards": []}')
    with serving(FlakyServer(shards)) as address:
        with pytest.raises(DataError, match="names no shards"):
            RemoteShardSource(address, a_cache(tmp_path / "c"))


def test_a_damaged_index_next_to_the_shard_is_not_used(shards, tmp_path):
    expected = ShardSource(sorted(shards.glob("*.tar"))).fingerprint
    for number, tar in enumerate(sorted(shards.glob("*.tar"))):
        index_path(tar).write_bytes([b"", b"text", np.random.default_rng(0).bytes(3000)][number % 3])
    with serving(FlakyServer(shards)) as address:
        assert RemoteShardSource(address, a_cache(tmp_path / "c")).fingerprint == expected
