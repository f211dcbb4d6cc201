"""Published files by name: downloaded once, resumed, checked, and refused if they are something else."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import re
import ssl
from pathlib import Path

import pytest
import torch

import ijepa_scale
from ijepa_scale.checkpoint import download, published_files
from ijepa_scale.checkpoint.published_files import FILES, PublishedFile, licence_of
from ijepa_scale.checkpoint.sources import open_source, read_weights
from ijepa_scale.config import ModelConfig, PretrainConfig
from ijepa_scale.config.architectures import resolve
from ijepa_scale.config.files import read_config
from ijepa_scale.config.finetune_run import FinetuneConfig
from ijepa_scale.config.yaml_text import parse_yaml
from ijepa_scale.data.sources import fetch
from ijepa_scale.data.sources.fetch import Retry
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models.registry import build_encoder, build_predictor
from ijepa_scale.train.initial import with_init
from launch import export as command
from tests.unit.checkpoint.https_server import Server, certificate, serving

SIZES = dict(name="vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=2, heads=3)
TINY = PublishedFile(file="tiny.pth.tar", width=24, depth=2, patch_size=8)
FORK = multiprocessing.get_context("fork")


def content(**changes) -> bytes:
    encoder = build_encoder(**{**SIZES, **changes}, seed=1).state_dict()
    predictor = build_predictor("vit_tiny", image_size=32, patch_size=8, width=12, depth=1, encoder_width=24, heads=3)
    parts = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor.state_dict()}
    buffer = io.BytesIO()
    torch.save({role: {f"module.{n}": t for n, t in part.items()} for role, part in parts.items()}, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(tmp_path: Path, pem: Path, monkeypatch: pytest.MonkeyPatch):
    found = Server(content())
    monkeypatch.setenv("IJEPA_SCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(FILES, "tiny", TINY)
    monkeypatch.setattr(fetch, "_RANGE", 20_000)
    monkeypatch.setattr(fetch, "_TRUSTED", ssl.create_default_context(cafile=f"{pem}.crt"))
    monkeypatch.setattr(download, "RETRY", Retry(attempts=3, first_pause_s=0.01, longest_pause_s=0.02, timeout_s=30))
    with serving(found, pem) as address:
        monkeypatch.setattr(download, "ADDRESS", address)
        yield found


def cached(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "published").iterdir() if not path.name.endswith(".lock")}


def refusal() -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source("published:tiny")
    (line,) = str(caught.value).splitlines()
    return line


def test_it_is_downloaded_once_and_named_like_any_source(tmp_path, server, caplog, capsys):
    with caplog.at_level(logging.INFO):
        encoder, _ = ijepa_scale.load("published:tiny", heads=3)
        assert len(server.content) > 3 * 20_000  # several ranges
        assert [first for first, _ in server.ranges] == list(range(0, len(server.content), 20_000))
        server.status = 503  # nothing is asked for from now on
        assert torch.equal(encoder.blocks[0].attn.qkv.weight, build_encoder(**SIZES, seed=1).blocks[0].attn.qkv.weight)
        to = tmp_path / "out.safetensors"
        assert command.main(["published:tiny", "--to", str(to), "--weights", "context"]) == 0
        assert command.main(["published:tiny", "--to", str(tmp_path / "p.safetensors"), "--weights", "predictor"]) == 2
        assert "doesn't state the heads" in capsys.readouterr().err
    said = [
        record.getMessage() for record in caplog.records if "licence of these weights is CC-BY-NC 4.0" in record.message
    ]
    assert len(said) == 1
    assert read_weights(to, which="context").facts.licence == "cc-by-nc-4.0"
    assert cached(tmp_path) == {"tiny.pth.tar", "tiny.pth.tar.json"}
    record = json.loads((tmp_path / "cache" / "published" / "tiny.pth.tar.json").read_text())
    assert record["bytes"] == len(server.content) and len(record["sha256"]) == 64 and "CC-BY-NC" in record["licence"]


def test_a_cut_transfer_goes_on_where_it_stopped(tmp_path, server):
    server.cuts = 5  # in 3 attempts in a row nothing arrives
    line = refusal()
    assert "couldn't be fetched in 3 attempts" in line and "are kept, to go on from" not in line
    server.cuts, server.ranges = 0, []
    part, received = server.content[:45_678], len(server.content) - 45_678
    first = Path(tmp_path / "cache" / "published" / "tiny.pth.tar.part")
    first.write_bytes(part)  # as a process leaves it that was killed
    note = {"url": f"{download.ADDRESS}tiny.pth.tar", "size": len(server.content), "version": "one"}
    first.with_name(f"{first.name}.from.json").write_text(json.dumps(note))
    server.sent = 0
    assert open_source("published:tiny").roles == ("target", "context")
    assert server.ranges[0][0] == 45_678 and server.sent == received
    assert (tmp_path / "cache" / "published" / "tiny.pth.tar").read_bytes() == server.content


def test_a_single_cut_costs_one_range(server):
    server.cuts = 1
    open_source("published:tiny")
    assert server.sent <= len(server.content) + 20_000


def test_a_file_that_changed_meanwhile_starts_again(tmp_path, server):
    folder = tmp_path / "cache" / "published"
    folder.mkdir(parents=True)
    (folder / "tiny.pth.tar.part").write_bytes(b"x" * 30_000)
    note = {"url": f"{download.ADDRESS}tiny.pth.tar", "size": len(server.content), "version": "another"}
    (folder / "tiny.pth.tar.part.from.json").write_text(json.dumps(note))
    open_source("published:tiny")
    assert server.ranges[0][0] == 0
    assert (folder / "tiny.pth.tar").read_bytes() == server.content


def test_runs_start_from_it(server):
    config = PretrainConfig(model=ModelConfig(init="published:tiny", heads=3), augment={"crop_scale": (0.3, 1.0)})
    sizes = resolve(with_init(config).model)
    assert (sizes.width, sizes.depth, sizes.patch_size, sizes.predictor_width) == (24, 2, 8, 12)
    text = "model: {init: 'published:tiny', encoder: {heads: 3}}"
    assert with_init(FinetuneConfig(**parse_yaml(text, "text"))).model.encoder.image_size == (32, 32)


def damaged(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("truncated", "cut short: the end of its .* bytes lacks the list of contents; copy it again"),
        ("claims less", "cut short: the end of its 50000 bytes lacks the list of contents"),
        ("one bit", "is damaged at .*; try again"),
        ("a page", "a web page, such as a login; download the file itself"),
        ("text", "isn't a file of torch.save"),
        ("another encoder", "holds an encoder of width 24 with 3 blocks and 8-pixel patches instead of 24, 2 and 8"),
        ("no encoder", "isn't a known encoder"),
    ],
)
def test_what_is_not_the_published_file_is_removed(tmp_path, server, what, text):
    whole = server.content
    if what == "truncated":
        server.content = whole[:-30_000]
    elif what == "claims less":
        server.claimed = 50_000
    elif what == "one bit":
        server.content = damaged(whole)
    elif what == "a page":
        server.html = b"<!doctype html><html>log in</html>"
    elif what == "text":
        server.html = b"no such file"
    elif what == "another encoder":
        server.content = content(depth=3)
    else:
        buffer = io.BytesIO()
        torch.save({"weight": torch.zeros(3)}, buffer)
        server.content = buffer.getvalue()
    line = refusal()
    assert line.startswith(f"{download.ADDRESS}tiny.pth.tar isn't the published file, and was removed: ")
    assert re.search(text, line), line
    assert cached(tmp_path) == set()
    server.content, server.claimed, server.html, server.etag = whole, None, None, "two"
    open_source("published:tiny")
    assert cached(tmp_path) == {"tiny.pth.tar", "tiny.pth.tar.json"}


def test_a_server_that_claims_more_leaves_what_arrived(tmp_path, server):
    server.claimed = len(server.content) + 10_000
    line = refusal()
    assert "couldn't be fetched in 3 attempts (last error: received" in line and "GB are kept, to go on from" in line
    assert "tiny.pth.tar" not in cached(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("redirect", "http://127.0.0.1:1/moved", "redirects to http://127.0.0.1:1, which isn't https"),
        ("redirect", "//127.0.0.1:1\\moved", "which isn't https"),
        ("status", 404, "can't be fetched"),
        ("status", 403, "can't be fetched"),
        ("status", 503, "couldn't be fetched in 3 attempts"),
        ("ignores_ranges", True, "is sent without its size, or not in ranges; download it yourself"),
    ],
)
def test_servers_that_refuse_or_mislead(tmp_path, server, setting, value, text):
    setattr(server, setting, value)
    assert text in refusal()
    assert cached(tmp_path) <= {"tiny.pth.tar.part.from.json"} and server.sent == 0


def test_a_redirect_to_https_is_followed(tmp_path, server):
    server.redirect = "/moved/tiny.pth.tar"
    open_source("published:tiny")
    assert "tiny.pth.tar" in cached(tmp_path)


def test_an_unknown_certificate_is_refused_at_once(tmp_path, server, monkeypatch):
    monkeypatch.setattr(fetch, "_TRUSTED", None)
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    assert "can't be fetched" in (line := refusal()) and "ertificate" in line
    assert server.sent == 0


def test_a_file_that_changed_later_is_removed(tmp_path, server):
    open_source("published:tiny")
    path = tmp_path / "cache" / "published" / "tiny.pth.tar"
    path.write_bytes(damaged(server.content))
    line = refusal()
    assert f"{path} has changed since its first use: {len(server.content)} bytes with SHA-256 " in line
    assert line.endswith("it was removed: run again to download it") and cached(tmp_path) == set()
    open_source("published:tiny")
    path.with_name("tiny.pth.tar.json").write_text("{")
    assert "tiny.pth.tar.json can't be read; remove it if tiny.pth.tar is the file that you want" in refusal()


def test_a_file_put_there_by_hand_is_recorded(tmp_path, server, caplog):
    server.status = 503
    folder = tmp_path / "cache" / "published"
    folder.mkdir(parents=True)
    (folder / "tiny.pth.tar").write_bytes(server.content)
    open_source("published:tiny")
    assert "recorded for later uses; no published hash is known" in caplog.text
    (folder / "tiny.pth.tar").write_bytes(server.content + b"x")
    assert "has changed since its first use" in refusal()


@pytest.mark.parametrize("change", [lambda whole: whole[:-100], damaged, lambda whole: b"", lambda _: content(depth=3)])
def test_another_file_put_there_by_hand_is_refused_and_left(tmp_path, server, change):
    path = tmp_path / "cache" / "published" / "tiny.pth.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(change(server.content))
    line = refusal()
    assert line.startswith(f"{path} was put there by hand and isn't the published file (")
    assert line.endswith("); replace it, or remove it to download it") and "tiny.pth.tar" in cached(tmp_path)
    path.write_bytes(server.content)  # a whole copy replaces it
    open_source("published:tiny")
    assert server.sent == 0


def test_a_full_disk_is_said_before(tmp_path, server, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "GB more, and" in (line := refusal()) and "free space, or set IJEPA_SCALE_CACHE to another folder" in line
    assert server.sent == 0


def _load(results) -> None:  # noqa: ANN001
    results.put(len(read_weights("published:tiny").tensors))


def test_one_of_several_processes_downloads(tmp_path, server):
    results = FORK.Queue()
    processes = [FORK.Process(target=_load, args=(results,)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
    assert found == {29} and server.sent == len(server.content)


def test_unknown_names_and_the_four_known_ones(capsys):
    with pytest.raises(
        CheckpointError, match="did you mean published:in22k_vitg16_ep44. Choose from in1k_vith14_ep300, "
    ):
        open_source("published:in22k_vitg16_ep4")
    for name, known in FILES.items():
        path = Path(__file__).parents[3] / "configs" / f"{name}.yaml"
        if path.exists():
            model = read_config(str(path), needs_paths=False).config.model
            assert model.patch_size == known.patch_size and {"huge": 1280, "giant": 1408}[model.name[4:]] == known.width
    assert published_files.ADDRESS.startswith("https://") and len(FILES) == 4


@pytest.mark.parametrize(
    ("source", "is_theirs"),
    [
        ("published:in1k_vith14_ep300", True),
        ("/data/IN22K-vit.g.16-600e.pth.tar", True),
        ("timm:vit_huge_patch14_gap_224.in1k_ijepa", True),
        ("transformers:facebook/ijepa_vith14_1k", True),
        ("facebook/ijepa_vith14_1k", True),
        ("timm:vit_base_patch16_224", False),
        ("runs/ijepa", False),
        ("None", False),
    ],
)
def test_whose_licence_is_known(source, is_theirs):
    assert licence_of(source) == ("cc-by-nc-4.0" if is_theirs else None)
