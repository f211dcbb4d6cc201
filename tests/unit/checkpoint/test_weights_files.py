"""Files given as weights: what isn't one is named, harmless types are read past, encoders are found by their prefix."""

from __future__ import annotations

import argparse
import bz2
import collections
import datetime
import enum
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ijepa_scale.checkpoint.sources import read_weights
from ijepa_scale.checkpoint.weights import load_weights
from ijepa_scale.errors import CheckpointError
from ijepa_scale.models import build_encoder

SIZES = dict(name="vit_tiny", image_size=(32, 32), patch_size=8, width=24, depth=2, heads=3)
TARGET, CONTEXT = (build_encoder(**SIZES, seed=seed).state_dict() for seed in (1, 2))
NAMES = [name for name in TARGET if name != "pos_embed"]


def prefixed(prefix: str, tensors: dict = TARGET) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def bytes_of(content: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def refusal(path: Path, which: str = "target") -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path, which=which)
    (line,) = str(caught.value).splitlines()
    return line


def archived(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("model.pth", b"x")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("model.pth"))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2525000000\n"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pth.tar", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (POINTER, f"a pointer of Git LFS, {len(POINTER)} bytes that stand for the file; run `git lfs pull` in its"),
        (
            b"/annex/objects/SHA256E-s1--0.pth\n",
            "a pointer of git-annex, 33 bytes that stand for the file; run `git an",
        ),
        (b"\n <!DOCTYPE html><html>", "a web page, such as a login; download the file itself"),
        (b"\xef\xbb\xbf<html>", "a web page, such as a login; download the file itself"),
        (b"<?xml version='1.0'?><Error>", "an XML document, such as a store's refusal; download the file itself"),
        (b'{"error": "not found"}', "JSON text, such as a server's error; download the weights themselves"),
        (b"", "empty (0 bytes); copy it again"),
        (bytes(5000), "empty (5000 bytes, all zero); copy it again"),
        (archived("zip"), "a zip archive without PyTorch's data.pkl; unpack it and give the file inside"),
        (archived("tar"), "a tar archive; unpack it and give the file inside"),
        (gzip.compress(b"x", mtime=0), "a gzip archive; unpack it and give the file inside"),
        (bz2.compress(b"x"), "a bzip2 archive; unpack it and give the file inside"),
        (lzma.compress(b"x"), "an xz archive; unpack it and give the file inside"),
        (b"\x89HDF\r\n", "an HDF5 file, such as Keras'; convert it to .safetensors"),
        (bytes_of(TARGET)[:3000], "cut short: the end of its 3000 bytes lacks the list of contents; copy it again"),
    ],
)
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, suffix: str, content: bytes, kind: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert f"{path} holds no weights that can be read: it is {kind}" in refusal(path)


def test_weights_in_the_other_format_say_so(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes_of(TARGET))
    assert refusal(tmp_path / "a.safetensors").endswith("it is a PyTorch file; rename it to .pth")
    save_file(TARGET, tmp_path / "b.pth")
    assert refusal(tmp_path / "b.pth").endswith("it is in the safetensors format; rename it to .safetensors")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "c.pt")
    assert "it is a TorchScript program, which holds code; save its state_dict()" in refusal(tmp_path / "c.pt")
    save_file(TARGET, tmp_path / "d.safetensors")
    whole = (tmp_path / "d.safetensors").read_bytes()
    (tmp_path / "e.safetensors").write_bytes(whole[:100])
    assert "it is cut short: 100 bytes, and its header alone has" in refusal(tmp_path / "e.safetensors")
    (tmp_path / "f.safetensors").write_bytes(whole[:-100])
    assert "can't be read as safetensors" in refusal(tmp_path / "f.safetensors")
    (tmp_path / "g.pth").write_bytes(bytes_of(TARGET, zipped=False)[:3000])
    assert "can't be read as a PyTorch file" in refusal(tmp_path / "g.pth")


HARMLESS = {
    "namespace": argparse.Namespace(lr=1e-3, more=types.SimpleNamespace(a=[1])),
    "numpy scalars": [np.float64(3.0), np.int32(2), np.bool_(True), np.dtype("float32")],
    "numpy arrays": {"rng": np.zeros(3), "state": np.random.default_rng(0).bit_generator.state["bit_generator"]},
    "paths": [pathlib.Path("/a/b"), pathlib.PurePosixPath("c")],
    "collections": [collections.defaultdict(list, {"a": [1]}), collections.deque([1, 2]), frozenset({1})],
    "times": [datetime.datetime(2024, 1, 1), datetime.timedelta(1)],
    "omegaconf": OmegaConf.create({"a": {"b": [1, "x", 2.0, None, True]}, "c": "${a.b}"}),
    "version": torch.__version__,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_types_are_read_past(tmp_path: Path, kind: str, zipped: bool) -> None:
    content = {"args": HARMLESS[kind], "state_dict": TARGET, "epoch": 3}
    with pytest.raises(Exception, match="eights only load failed"):  # PyTorch alone refuses it, so this tests something
        torch.load(io.BytesIO(bytes_of(content, zipped=zipped)), weights_only=True)
    (tmp_path / "w.pth").write_bytes(bytes_of(content, zipped=zipped))
    found = read_weights(tmp_path / "w.pth").tensors
    assert found.keys() == TARGET.keys() and all(torch.equal(found[name], TARGET[name]) for name in TARGET)


class Color(enum.Enum):
    RED = 1


class Runs:
    def __init__(self, function, *arguments) -> None:  # noqa: ANN001, ANN002
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Color.RED, f"{__name__}.Color"),
        (Runs(print, "run!"), "print"),
        (Runs(os.system, "touch ran"), "posix.system"),
        (Runs(eval, "open('ran', 'w')"), "eval"),
        (Runs(os.mkdir, "ran"), "posix.mkdir"),
        (Runs(getattr, "a", "upper"), "getattr"),
    ],
)
def test_other_types_are_named_and_nothing_runs(  # noqa: ANN201
    tmp_path: Path,
    monkeypatch,
    thing: object,
    name: str,
    zipped: bool,  # noqa: ANN001
):
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(bytes_of({"args": thing, "state_dict": TARGET}, zipped=zipped))
    text = f"isn't a file of tensors and plain values, and is refused: loading {name} could run code; convert it to"
    assert text in refusal(Path("w.pth"))
    assert os.listdir() == ["w.pth"]


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    [
        "backbone.", "module.", "_orig_mod.", "encoder.", "module.backbone.", "backbone._orig_mod.", "model.encoder.",
        "net.", "_fsdp_wrapped_module.encoder.", "module._orig_mod.module.",
    ],
)  # fmt: skip
def test_a_prefix_is_removed(tmp_path: Path, prefix: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    tensors = prefixed(prefix)
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors, "epoch": 1}, path)
    weights = read_weights(path)
    assert weights.which == "only" and len(weights.notes) == 1
    assert all(torch.equal(weights.tensors[name], TARGET[name]) for name in NAMES)
    load_weights(build_encoder(**SIZES, seed=5), path)


def test_wrappers_inside_names_are_removed(tmp_path: Path) -> None:
    tensors = {
        name.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."): TARGET[name] for name in TARGET
    }
    torch.save(tensors, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").tensors.keys() == TARGET.keys()
    torch.save({**tensors, "blocks.0.norm1.weight": torch.zeros(24)}, tmp_path / "w.pth")
    assert "holds blocks.0.norm1.weight twice, once in a wrapper" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("target", "context"),
    [("teacher.backbone.", "student.backbone."), ("target_encoder.", "encoder."), ("ema.", "model.encoder.")],
)
def test_of_two_encoders_the_one_asked_for_is_read(tmp_path: Path, target: str, context: str) -> None:
    other = {"predictor.norm.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}
    both = {**prefixed(target, TARGET), **prefixed(context, CONTEXT), **other}
    path = tmp_path / "w.ckpt"
    torch.save({"state_dict": both}, path)
    for which, expected in (("target", TARGET), ("context", CONTEXT)):
        weights = read_weights(path, which=which)
        assert weights.which == which
        assert all(torch.equal(weights.tensors[name], expected[name]) for name in NAMES)
        assert weights.notes == (weights.notes[0],) and "tensors outside the encoder are left out: " in weights.notes[0]
    torch.save({"teacher": prefixed("backbone."), "student": prefixed("backbone.", CONTEXT)}, path)
    assert torch.equal(read_weights(path, which="context").tensors["norm.weight"], CONTEXT["norm.weight"])
    torch.save(prefixed("teacher."), path)
    assert read_weights(path).which == "target"
    assert refusal(path, "context").endswith(
        "only the target encoder, but context is requested; set model.weights=target, in Python which='target'"
    )
    torch.save({**prefixed("a."), **prefixed("b.")}, path)
    assert "holds 2 encoders (a, b), and 0 of them are called target; save the one to load" in refusal(path)


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    head = {"model.head.weight": torch.zeros(3, 24), "model.head.bias": torch.zeros(3), "metric.total": torch.zeros(1)}
    torch.save({"state_dict": {**prefixed("model.backbone."), **head}}, tmp_path / "w.ckpt")
    weights = read_weights(tmp_path / "w.ckpt")
    assert {"head.weight", "head.bias"} <= weights.tensors.keys() and "metric.total" not in weights.tensors
    assert weights.notes[1] == "1 tensors outside the encoder are left out: metric.total"


def sharded(folder: Path) -> Path:
    halves = {"model-00001-of-00002.safetensors": NAMES[::2], "model-00002-of-00002.safetensors": NAMES[1::2]}
    for file, names in halves.items():
        save_file({name: TARGET[name] for name in names}, folder / file)
    places = {name: file for file, names in halves.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_shards_with_an_index_are_read(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for source in (tmp_path, index):
        assert all(torch.equal(read_weights(source).tensors[name], TARGET[name]) for name in NAMES)
    first = tmp_path / "model-00001-of-00002.safetensors"
    save_file({NAMES[0]: TARGET[NAMES[0]]}, first)
    assert f"{first} lacks {sorted(NAMES[2::2])[0]}, which {index.name} places in it; download both" in refusal(
        tmp_path
    )
    first.write_bytes(POINTER)
    assert f"{first} holds no weights that can be read: it is a pointer of Git LFS" in refusal(tmp_path)
    first.unlink()
    assert refusal(tmp_path) == (
        f"{index} names model-00001-of-00002.safetensors, which isn't there; download it into {tmp_path} too"
    )


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"weight_map": [1]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "../b"}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "isn't an index of safetensors files" in refusal(tmp_path)


@pytest.mark.parametrize("plain, average", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_an_average_next_to_a_model_is_the_target(tmp_path: Path, plain: str, average: str) -> None:
    path = tmp_path / "w.pth"
    torch.save({plain: CONTEXT, average: prefixed("module."), "epoch": 1}, path)
    for which, expected in (("target", TARGET), ("context", CONTEXT)):
        weights = read_weights(path, which=which)
        assert weights.which == which and all(torch.equal(weights.tensors[n], expected[n]) for n in NAMES)
        assert weights.notes == (
            f"holds {plain} and its average {average}: the average is the target, {plain} the context; model.weights "
            "chooses",
        )
    torch.save({average: TARGET}, path)
    assert read_weights(path).which == "target"
    assert "holds only the target encoder, but context is requested; set model.weights=target" in refusal(
        path, "context"
    )


@pytest.mark.parametrize(
    "nested",
    [
        {"model": {"encoder": TARGET}},
        {"state_dict": {"model": {"backbone": TARGET}}},
        {"checkpoint": {"net": TARGET, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}},
        {"module": {"a.b": {"c": prefixed("d.")}}},
    ],
)
def test_nested_dictionaries_are_read(tmp_path: Path, nested: dict) -> None:
    torch.save(nested, tmp_path / "w.pth")
    found = read_weights(tmp_path / "w.pth").tensors
    assert found.keys() == TARGET.keys() and all(torch.equal(found[n], TARGET[n]) for n in NAMES)


@pytest.mark.parametrize("name", ["w.PTH", "w.pth.TAR", "w.SafeTensors"])
def test_a_suffix_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file(TARGET, path) if "Safe" in name else torch.save(TARGET, path)
    assert torch.equal(read_weights(path).tensors["norm.weight"], TARGET["norm.weight"])


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_plain_pickle_is_named(tmp_path: Path, protocol: int) -> None:
    for content in ({"a": [1, 2]}, {name: tensor.numpy() for name, tensor in TARGET.items()}, [Color.RED]):
        (tmp_path / "w.pth").write_bytes(pickle.dumps(content, protocol=protocol))
        assert refusal(tmp_path / "w.pth").endswith(
            "it is a plain pickle, which may hold code; load it with the program that wrote it, and torch.save its "
            "state_dict()"
        )


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "model.safetensors.index.json", "w"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert (
        refusal(tmp_path / name)
        == f"{tmp_path / name} is a pipe or a device; weights are read from files: copy it into one"
    )
    os.mkfifo(tmp_path / "model.safetensors")
    assert "model.safetensors is a pipe or a device" in refusal(tmp_path)


def test_an_index_that_is_a_pointer_says_so(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    for content, kind in ((POINTER, "a pointer of Git LFS"), (b"", "empty (0 bytes)"), (b"<html>", "a web page")):
        index.write_bytes(content)
        for source in (tmp_path, index):
            assert f"{index} holds no weights that can be read: it is {kind}" in refusal(source)
