"""Hostile servers, files and names: each would leave a trace (a request, memory, a terminal code), and leaves none."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import logging
import os
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yarl

from ijepa_scale.checkpoint.download import RETRY
from ijepa_scale.config.data import DataConfig
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.cache import FileCache, RemoteFile
from ijepa_scale.data.sources.fetch import Retry, _checked_redirects, fetch, open_remote, remote_size
from ijepa_scale.data.sources.remote import RemoteShardSource, list_remote
from ijepa_scale.data.sources.tar_index import index_path, index_tar
from ijepa_scale.data.sources.tar_shards import ShardSource
from ijepa_scale.errors import ConfigError, DataError
from tests.unit.data.flaky_server import FlakyServer, serving
from tests.unit.data.test_data_loader import jpeg

ROOT = Path(__file__).parents[3]
ONCE = Retry(attempts=2, first_pause_s=0.001)


class Redirecting:
    """A server that answers each request by a redirect, or by a file, and keeps what it was asked."""

    def __init__(self, target=None, header="Location"):
        self.target, self.header, self.asked = target, header, []


@contextlib.contextmanager
def redirecting(server):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            server.asked.append((self.path, dict(self.headers)))
            self.send_response(302 if server.target else 200)
            if server.target:
                self.send_header(server.header, server.target)
            self.send_header("Content-Length", "0" if server.target else "4")
            self.end_headers()
            if not server.target and self.command == "GET":
                self.wfile.write(b"data")

        do_HEAD = do_GET

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()


def fetched(url, folder, retry=ONCE):
    fetch(url, folder / "x", size=4, sha256=None, retry=retry, largest=4)
    return (folder / "x").read_bytes()


@pytest.mark.parametrize("header", ["Location", "URI"])
@pytest.mark.parametrize("way", ["fetch", "stream"])
def test_a_redirect_to_another_server_sends_it_no_request(tmp_path, header, way):
    other = Redirecting()
    with redirecting(other) as there, redirecting(Redirecting(f"http://{there}/x", header)) as here:
        with pytest.raises(
            DataError, match=rf"redirects to another server, http://{there}; .*data.redirect_hosts=.{there}"
        ):
            if way == "fetch":
                fetched(f"http://{here}/a.tar", tmp_path)
            else:
                open_remote(f"http://{here}/a.tar", ONCE).read()
        assert other.asked == []


def test_every_hop_is_checked(tmp_path):
    last, middle = Redirecting(), Redirecting()
    with redirecting(last) as third, redirecting(middle) as second:
        middle.target = f"http://{third}/x"
        with redirecting(Redirecting(f"http://{second}/x")) as first:
            with pytest.raises(DataError, match=f"redirects to another server, http://{third}"):
                fetched(f"http://{first}/a.tar", tmp_path, Retry(attempts=1, redirect_hosts=(second,)))
        assert middle.asked and not last.asked


def test_an_allowed_server_gets_no_credentials(tmp_path):
    other, first = Redirecting(), Redirecting()
    with redirecting(other) as there, redirecting(first) as here:
        first.target = f"http://{there}/x"
        retry = Retry(attempts=1, redirect_hosts=(there,))
        assert fetched(f"http://user:secret@{here}/a.tar", tmp_path, retry) == b"data"
    sent = "Basic " + base64.b64encode(b"user:secret").decode()
    assert first.asked[0][1]["Authorization"] == sent
    assert other.asked and not any("secret" in str(asked) or "Authorization" in asked[1] for asked in other.asked)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://a.org/x", "isn't https"), ("//a.org:80/x", None), ("ftp://a.org/x", "isn't https"),
        ("//b.org/x", "another server, https://b.org:443"), ("https://a.org:444/x", "another server"),
        ("/y", None), ("https://cdn.org/x?token=1", None), ("https://cdn.org:1/x", "another server"),
        ("http://127.0.0.1/x", "isn't https"), ("", None), ("http://[", "isn't https"),
    ],
)  # fmt: skip
def test_where_https_may_lead(target, said):
    import asyncio
    from types import SimpleNamespace

    check = _checked_redirects(("cdn.org",)).on_request_redirect[0]
    step = SimpleNamespace(
        url=yarl.URL("https://u:p@a.org/x?key=1"), response=SimpleNamespace(headers={"Location": target})
    )
    if target.startswith("//a.org:80"):
        said = "another server"
    if said is None:
        return asyncio.run(check(None, None, step))
    with pytest.raises(DataError, match=f"https://a.org/x redirects to .*{said}") as caught:
        asyncio.run(check(None, None, step))
    assert "u:p" not in str(caught.value) and "token" not in str(caught.value)


@pytest.mark.parametrize("act", [
    lambda url, to: fetch(url, to, size=None, sha256=None, retry=ONCE, largest=9),
    lambda url, to: remote_size(url, ONCE),
    lambda url, to: list_remote(url, FileCache(to, 1000, ONCE)),
])  # fmt: skip
@pytest.mark.parametrize("at", [
    "http://u:secret@127.0.0.1:9/a.tar?X-Amz-Signature=secret", "ftp://u:secret@h/a.tar?k=secret",
    "http://u:secret@example.org/a.tar?k=secret#secret",
])  # fmt: skip
def test_no_message_holds_what_may_be_secret(tmp_path, act, at, caplog):
    with pytest.raises(DataError) as caught:
        act(at, tmp_path / "a")
    assert "secret" not in str(caught.value) + caplog.text and "/a.tar" in str(caught.value)


def test_a_missing_file_is_named_without_secrets(tmp_path):
    with redirecting(Redirecting("http://127.0.0.1/x?k=secret")) as here:
        with pytest.raises(DataError) as caught:
            fetched(f"http://u:secret@{here}/a.tar?k=secret", tmp_path, ONCE)
    assert "secret" not in str(caught.value)


def test_where_redirects_cannot_be_allowed_no_setting_is_named(tmp_path):
    with redirecting(Redirecting()) as there, redirecting(Redirecting(f"http://{there}/x")) as here:
        with pytest.raises(DataError, match=r"another server, http://.*; download the file yourself$"):
            fetched(f"http://{here}/a.tar", tmp_path, dataclasses.replace(ONCE, redirect_hosts=None))
    assert RETRY.redirect_hosts is None


def test_servers_are_named_without_paths():
    with pytest.raises(ConfigError, match="'https://cdn.org' isn't a server; give names without https:// and paths"):
        DataConfig(batch_size=1, redirect_hosts=["https://cdn.org"])


@pytest.fixture
def shards(tmp_path):
    return write_shards([Sample(f"{n:03d}", jpeg(n), 0) for n in range(20)], tmp_path / "set", shard_bytes=9_000)


def bomb(tar, **arrays):
    """Replaces the index of a tar by one whose arrays are compressed or claim to be larger than they are."""
    with zipfile.ZipFile(index_path(tar), "w", arrays.pop("method", zipfile.ZIP_DEFLATED)) as archive:
        for name in ("stamp", "offsets", "sizes", "labels", "key_bytes", "key_ends", "problems", "texts"):
            archive.writestr(f"{name}.npy", arrays.get(name, npy(np.zeros(1 << 22, np.int64))))


def npy(array, shape=None):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"shape": shape or array.shape, "fortran_order": False, "descr": array.dtype.str}
    )
    return stream.getvalue() + array.tobytes()


@pytest.mark.parametrize("kind", ["compressed", "claims", "objects", "many"])
def test_an_index_that_inflates_is_not_read(shards, kind, caplog):
    expected = index_tar(shards[0]).offsets
    if kind == "compressed":
        bomb(shards[0])
    elif kind == "claims":
        bomb(shards[0], method=zipfile.ZIP_STORED, **dict.fromkeys(
            ("stamp", "offsets", "sizes", "labels", "key_bytes", "key_ends", "problems", "texts"),
            npy(np.zeros(3, np.int64), (1 << 40,)),
        ))  # fmt: skip
    elif kind == "objects":
        np.savez(index_path(shards[0]), stamp=np.array([print], dtype=object), allow_pickle=True)
    else:
        index_path(shards[0]).write_bytes(bytes(1 << 25))
    tracemalloc.start()
    with caplog.at_level(logging.WARNING):
        found = index_tar(shards[0]).offsets
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(found, expected) and peak < 20 << 20
    assert "is damaged" in caplog.text


def test_a_pipe_in_the_place_of_an_index_is_not_waited_for(shards):
    index_path(shards[0]).unlink()
    os.mkfifo(index_path(shards[0]))
    assert len(index_tar(shards[0]))


def test_a_cache_that_others_can_write_to_is_refused(shards, tmp_path):
    for mode in (0o775, 0o757):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(DataError, match=rf"folder {folder} has mode {mode:o}, .*\(chmod go-w {folder}\), or name"):
            FileCache(folder, 1 << 20)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
        with pytest.raises(DataError, match=r"belongs to user 12345, who could change .*; name a folder of your own"):
            FileCache(folder, 1 << 20)
    before = os.umask(0o002)
    try:
        cache = FileCache(tmp_path / "new" / "cache", 1 << 20)  # of its own making, under the usual umask of groups
        with serving(FlakyServer(shards[0].parent)) as address:
            source = RemoteShardSource(address, cache)
            assert source.read(0) == ShardSource(shards).read(0)
            (cache.folder / "index").chmod(0o777)
            with pytest.raises(DataError, match="index has mode 777"):
                RemoteShardSource(address, cache)
    finally:
        os.umask(before)
    assert all(not path.stat().st_mode & 0o022 for path in cache.folder.glob("*.tar"))


def test_a_cached_file_that_others_could_write_is_fetched_again(shards, tmp_path, caplog):
    cache = FileCache(tmp_path / "c", 1 << 20, ONCE)
    with serving(FlakyServer(shards[0].parent)) as address:
        file = RemoteFile(f"{address}/{shards[0].name}")
        cache.open(file).close()
        cache.path(file.url).write_bytes(b"forged")
        cache.path(file.url).chmod(0o666)
        handle = cache.open(file)
        assert os.pread(handle.descriptor, 1 << 20, 0) == shards[0].read_bytes()
        handle.close()
    assert "other users can write to this cached file, so it is fetched again" in caplog.text


def test_a_damaged_copy_in_the_cache_is_fetched_again(shards, tmp_path, caplog):
    server = FlakyServer(shards[0].parent)
    with serving(server) as address:
        first = RemoteShardSource(address, FileCache(tmp_path / "c", 1 << 20, ONCE))
        expected = first.read(0)
        first._close(0)  # who fetches it again waits for all that read it
        cached = next(path for path in (tmp_path / "c").glob("*.tar"))
        content = bytearray(cached.read_bytes())
        content[700] ^= 255
        cached.write_bytes(content)
        source = RemoteShardSource(address, FileCache(tmp_path / "c", 1 << 20, ONCE))
        assert source.read(0) == expected and source.read(1)
    assert caplog.text.count("the copy in the cache differs from the manifest, so it is fetched again") == 1
    assert server.sent[f"/{shards[0].name}"] == 2


CODE = "\x1b]0;owned\x07\x1b[31m\n\x9b2J\u202e"


def hostile(folder):
    """Writes bad and good images under names with terminal codes, as a folder, a tar, a zip and a list."""
    root = folder / f"set{CODE}"
    for name in (f"a{CODE}", f"b{CODE}"):
        (root / name).mkdir(parents=True)
        for number in range(4):
            (root / name / f"{number}{CODE}.jpg").write_bytes(jpeg(number) if number else b"bad")
        (root / name / f"0{CODE}.zip").write_bytes(b"bad")
    tar, archive = folder / f"x{CODE}.tar", folder / f"x{CODE}.zip"
    with tarfile.open(tar, "w") as out, zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(root.rglob("*.jpg")):
            out.add(path, str(path.relative_to(root)))
            zipped.write(path, str(path.relative_to(root)))
        for suffix in (".jpg", ".png", ".cls"):
            member = tarfile.TarInfo(f"../up{CODE}{suffix}")
            out.addfile(member)
            out.addfile(tarfile.TarInfo(f"same{CODE}{suffix}"))
    listed = folder / f"list{CODE}.csv"
    rows = "".join(f'"{path}",0\n' for path in sorted(root.rglob("*.jpg")))
    listed.write_text("path,label\n" + rows + f'"/no/such{CODE}",x{CODE}\n')
    return {"imagefolder": root, "tar": tar, "zip": archive, "list": listed, "shards": tar}


@pytest.mark.parametrize(
    "kind",
    [
        "shards",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("imagefolder", "tar", "zip", "list", "stream")),
    ],
)
def test_no_message_holds_a_terminal_code(tmp_path, kind):
    made = {**hostile(tmp_path), "stream": tmp_path / f"x{CODE}.tar"}
    script = (
        "import sys\n"
        "from ijepa_scale import terminal\n"
        "from tests.unit.data.test_data_security import read_all\n"
        "terminal.log_to_terminal()\n"
        "sys.exit(terminal.command(read_all)(sys.argv[1:]))\n"
    )
    arguments = [sys.executable, "-c", script, kind, str(made[kind]), str(tmp_path / f"to{CODE}")]
    path = os.pathsep.join([str(ROOT), str(ROOT / ".path")])
    done = subprocess.run(arguments, capture_output=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    said = (done.stdout + done.stderr).decode()
    assert "Traceback" not in said and "\\u001b" in said, said
    for code in ("\x1b", "\x07", "\x9b", "\u202e"):
        assert code not in said


def read_all(arguments):
    """Reads what is under a path in every way, and prints the errors as scripts do."""
    from ijepa_scale import terminal
    from ijepa_scale.config.schema import AugmentConfig
    from ijepa_scale.data.eval_reader import bad_images
    from ijepa_scale.data.loader import TrainLoader
    from ijepa_scale.data.shards.command_line import run_command
    from ijepa_scale.data.sources.open import training_order, training_source
    from ijepa_scale.data.sources.source import check_problems

    kind, path, to = arguments
    reader = {"tar": "shards", "zip": "imagefolder"}.get(kind, kind)

    def tried(work):
        try:
            work()
        except DataError as error:
            terminal.report(error)

    def train():
        data = DataConfig(reader=reader, train=path, batch_size=4, max_bad_fraction=1.0)
        source = training_source(data, (8, 8))
        terminal.say(source.summary())
        tried(lambda: check_problems(source.problems(), source.num_samples or 1, 1.0))
        order = training_order(data, source, 4, seed=0, steps_per_epoch=2)
        loader = TrainLoader(
            source, order, AugmentConfig(), (8, 8), seed=0, stop_step=2, max_bad_fraction=1.0, workers=1
        )
        tried(lambda: list(loader))
        if reader != "stream":
            terminal.say(*bad_images(source, np.arange(source.num_samples)))

    def shards(*words):
        import argparse

        from ijepa_scale.data.shards.command_line import add_arguments

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        run_command(parser.parse_args(list(words)))

    tried(train)
    source = {"stream": "tar", "shards": "tar"}.get(kind, kind)
    tried(
        lambda: shards(
            "make", "--from", source, "--root", path, "--to", to, "--workers", "0", "--max-bad-fraction", "1"
        )
    )
    for word in ("verify", "info", "index"):
        tried(lambda word=word: shards(word, path if kind == "shards" else to))
    return 0
