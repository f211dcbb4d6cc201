"""Features of many images in one file: one process or several, killed or not, the file is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import ijepa_scale
from ijepa_scale import environment
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.engine.world import World
from ijepa_scale.errors import ConfigError, DataError
from ijepa_scale.evaluate import embed as embedding
from ijepa_scale.evaluate import parts as in_parts
from ijepa_scale.evaluate.embed import EmbedOptions, embed
from ijepa_scale.evaluate.image_sets import ImageSet
from ijepa_scale.evaluate.parts import Parts
from ijepa_scale.models.registry import build_encoder
from launch import embed as command

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = dict(image_size=16, patch_size=4, width=192, depth=12, heads=3)
COUNT = 23


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "encoder.safetensors"
    save_file(build_encoder("vit_tiny", **SIZES, seed=3).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        size = (*generator.integers(10, 40, 2), 3)
        inside = folder / f"{number % 3}"
        inside.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(inside / f"{number:03d}.png")
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_parts, "BATCHES", 2)


def options(photos: Path | list[str], model: str, to: Path, **changes: Any) -> EmbedOptions:
    images = [str(photos)] if isinstance(photos, Path) else photos
    return EmbedOptions(images=images, model=model, to=to, batch_size=2, workers=0, progress=False, **changes)


@pytest.mark.parametrize("pool", ["mean", "last4"])
def test_the_rows_are_the_features_of_the_images_in_order(photos: Path, model: str, tmp_path: Path, pool: Any) -> None:
    encoder, transform = ijepa_scale.load(model)
    names = sorted(str(path) for path in photos.rglob("*.png"))
    expected = ijepa_scale.features(encoder, names, transform=transform, pool=pool)
    for name in ("a.npy", "a.safetensors", "a.parquet"):
        result = embed(options(photos, model, tmp_path / name, pool=pool), ALONE)
        assert result[1:] == (COUNT, expected.shape[1], [], 0)
    rows = torch.from_numpy(np.load(tmp_path / "a.npy"))
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("features"), rows)
        assert file.metadata() == {"model": model, "which": "target", "pool": pool}
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table["name"].to_pylist() == names
    assert np.array_equal(np.array(table["features"].to_pylist(), dtype=np.float32), rows.numpy())
    for name in ("a.npy", "a.safetensors"):
        assert (tmp_path / f"{name}.names.txt").read_text().splitlines() == names
    files = {"a.npy", "a.npy.names.txt", "a.safetensors", "a.safetensors.names.txt", "a.parquet"}
    assert {path.name for path in tmp_path.iterdir()} == files  # no part and no unfinished file is left


@pytest.mark.parametrize("killed_at", [0, 1, 3, 5])
def test_a_broken_run_goes_on_and_gives_the_same_file(
    photos: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    embed(options(photos, model, tmp_path / "whole.npy"), ALONE)
    written, real = [], Parts._write

    def write(self: Parts, path: Path, parts: Any) -> None:
        if len(written) == killed_at:
            (path.parent / f".unfinished-{path.name}").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        real(self, path, parts)

    monkeypatch.setattr(Parts, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        embed(options(photos, model, tmp_path / "broken.npy"), ALONE)
    assert not (tmp_path / "broken.npy").exists() and len(written) == killed_at
    monkeypatch.setattr(Parts, "_write", lambda self, *given: (written.append(given[0]), real(self, *given)))
    embed(options(photos, model, tmp_path / "broken.npy"), ALONE)
    assert len(written) == len(set(written)) == 6  # nothing was computed twice
    assert (tmp_path / "broken.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_a_run_that_ends_while_it_writes_the_result_goes_on(
    photos: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(options(photos, model, tmp_path / "whole.npy"), ALONE)
    real = in_parts.shutil.rmtree

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    for broken in ("write_features", None):
        target = (embedding, "write_features") if broken else (in_parts.shutil, "rmtree")
        monkeypatch.setattr(*target, stop if broken is None else lambda *_: stop(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            embed(options(photos, model, tmp_path / "a.npy"), ALONE)
        monkeypatch.undo()
        monkeypatch.setattr(in_parts, "BATCHES", 2)
        assert (tmp_path / "a.npy").exists() == (broken is None) and (tmp_path / "a.npy.parts").exists()
    assert in_parts.shutil.rmtree is real
    embed(options(photos, model, tmp_path / "a.npy"), ALONE)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not (tmp_path / "a.npy.parts").exists()


def test_files_and_parts_of_others_are_not_touched(photos: Path, model: str, tmp_path: Path) -> None:
    to = tmp_path / "a.npy"
    embed(options(photos, model, to), ALONE)
    with pytest.raises(ConfigError, match="a.npy exists; name another file, or add --overwrite"):
        embed(options(photos, model, to), ALONE)
    assert embed(options(photos, model, to, overwrite=True), ALONE).rows == COUNT
    (tmp_path / "b.npy.parts").mkdir()
    (tmp_path / "b.npy.parts" / "plan.json").write_text('{"which": "context"}')
    with pytest.raises(
        ConfigError, match=r"b.npy.parts holds parts of other features \(images, count, model, which, po"
    ):
        embed(options(photos, model, tmp_path / "b.npy"), ALONE)
    with pytest.raises(ConfigError, match="ends in '.csv'; choose one of .npy, .safetensors, .parquet"):
        embed(options(photos, model, tmp_path / "b.csv"), ALONE)


def test_shards_lists_and_readers(photos: Path, model: str, tmp_path: Path) -> None:
    paths = sorted(photos.rglob("*.png"))
    write_shards([Sample(f"{n:03d}", p.read_bytes(), 0) for n, p in enumerate(paths)], tmp_path / "shards")
    (tmp_path / "list.txt").write_text("".join(f"{os.path.relpath(p, tmp_path)}\n" for p in paths))
    embed(options(photos, model, tmp_path / "a.npy"), ALONE)
    shard = str(next((tmp_path / "shards").glob("*.tar")))
    for number, images in enumerate(
        ([str(tmp_path / "shards")], [shard], [str(tmp_path / "list.txt")], [*map(str, paths)])
    ):
        embed(options(images, model, tmp_path / f"{number}.npy"), ALONE)
        assert (tmp_path / f"{number}.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()
    embed(options(photos, model, tmp_path / "b.npy", reader="imagefolder"), ALONE)
    assert np.load(tmp_path / "b.npy").shape == (COUNT, 192)
    with pytest.raises(DataError, match="shards and readers take one pattern; embed them one by one"):
        ImageSet.of([shard, str(photos)])
    with pytest.raises(DataError, match="list .*no.txt can't be read"):
        ImageSet.of([str(tmp_path / "no.txt")])


def test_a_lost_shard_is_one_line_and_counts_as_its_images(
    photos: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    tars = write_shards(
        [Sample(f"{n:03d}", each, 0) for n, each in enumerate(images)], tmp_path / "tars", shard_bytes=9000
    )
    rows = [row["samples"] for row in json.loads((tmp_path / "tars" / "manifest.json").read_text())["shards"]]
    assert len(rows) > 2 and min(rows) > 1
    tars[0].unlink()
    listed = ImageSet.of([str(tmp_path / "tars")])
    tars[1].write_bytes(b"changed")
    monkeypatch.setattr(embedding.ImageSet, "of", lambda *_: listed)
    result = embed(options(tmp_path / "tars", model, tmp_path / "a.npy"), ALONE)
    assert (result.rows, result.num_skipped) == (sum(rows[2:]), rows[0] + rows[1])
    assert len(result.skipped) == 2 and f"with {rows[0]} samples" in result.skipped[0]
    assert result.skipped[1].startswith(f"{rows[1]} images: shard {tars[1]} has changed since it was indexed")


def test_bad_files_are_skipped_and_named(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        Image.fromarray(np.full((20, 20, 3), 20 * number, np.uint8)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"not an image")
    (folder / "3.png").unlink()
    os.mkfifo(folder / "3.png")
    (folder / "é\n.png").symlink_to("nowhere")
    command_line = [str(folder), "--model", model, "--to", str(tmp_path / "a.npy"), "--workers", "0"]
    with pytest.raises(SystemExit) as ended:
        command.main(command_line)
    said = capsys.readouterr()
    assert ended.value.code == 2 and "7 x 192, 3 images skipped" in said.out
    skipped = [line for line in said.err.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 3 and "2.png: not an image" in skipped[0] and "3.png: not a regular file" in skipped[1]
    assert "é\\n.png: there is no such file" in skipped[2]
    names = (tmp_path / "a.npy.names.txt").read_text().splitlines()
    assert [Path(name).stem for name in names] == ["0", "1", "4", "5", "6", "7", "8"]
    for path in folder.iterdir():
        path.unlink()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        command.main([*command_line, "--overwrite"])
    assert ended.value.code == 2 and "none of 1 images can be used; the first: " in capsys.readouterr().err


def start(images: Path, model: str, to: Path, *more: str) -> subprocess.Popen:
    arguments = [sys.executable, str(ROOT / "launch" / "embed.py"), str(images), "--model", model, "--to", str(to)]
    child = environment.child_environment(
        OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path), CUDA_VISIBLE_DEVICES=""
    )
    return subprocess.Popen(
        [*arguments, "--workers", "0", *more], env=child, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.long
def test_several_processes_killed_or_not_write_the_same_file(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(1)
    for number in range(1300):  # 3 parts of 512
        Image.fromarray(generator.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")
    for processes in (1, 2, 3):
        child = start(folder, model, tmp_path / f"{processes}.npy", "--processes", str(processes))
        _, said = child.communicate(timeout=300)
        assert child.returncode == 0, said
        assert (tmp_path / f"{processes}.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    child = start(folder, model, tmp_path / "killed.npy")
    parts = tmp_path / "killed.npy.parts"
    while not list(parts.glob("part-*")):
        assert child.poll() is None and not (tmp_path / "killed.npy").exists()
        time.sleep(0.002)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed.npy").exists() and 1 <= len(list(parts.glob("part-*"))) < 3
    child = start(folder, model, tmp_path / "killed.npy", "--processes", "2")
    _, said = child.communicate(timeout=300)
    assert child.returncode == 0, said
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "1.npy").read_bytes()
    names = (tmp_path / "killed.npy.names.txt").read_text().splitlines()
    assert names == [str(folder / f"{number:04d}.png") for number in range(1300)]
