"""Checkpoints are complete or absent, verified, and readable by any engine on any number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ijepa_scale
from ijepa_scale.checkpoint import store
from ijepa_scale.config import AdamWConfig, EngineConfig
from ijepa_scale.engine.protocol import Piece
from ijepa_scale.engine.world import World
from ijepa_scale.errors import CheckpointError, ConfigError
from tests.distributed.harness import run
from tests.distributed.test_engines import ENGINES, reference
from tests.distributed.training import MODEL, full_state, images_of, make, masks_config, part

HALF, STEPS = 6, 10
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))


def write(world: World, engine: dict, folder: str) -> None:
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(), masks_config())
    for index in range(HALF):
        step(part(index, world))
    store.save(Path(folder), HALF, built.pieces(), world=world, extra={"note": 1}, keep=2)


def resume(world: World, engine: dict, folder: str) -> tuple[list[float], dict]:
    built, step = make(world, EngineConfig(**engine, precision="fp32"), AdamWConfig(), masks_config())
    path = store.newest(Path(folder))
    assert path is not None
    checkpoint = store.Checkpoint(path)
    checkpoint.load(built.pieces())
    built.loaded(checkpoint.step)
    loaded = full_state(world, built)
    full = {f"target.{k}": v.flatten() for k, v in checkpoint.full("target.").items()}
    assert all(torch.equal(full[name], loaded[name]) for name in full)
    losses = []
    for index in range(checkpoint.step, STEPS):
        losses.append(float(world.mean(step(part(index, world)).loss.clone())))
    return losses, full_state(world, built)


PLAIN = (1, {"strategy": "plain"})
PATHS = [
    ("plain", "zero1"), ("zero1", "plain"), ("zero2", "fsdp2"), ("fsdp2", "zero3"), ("zero3", "ddp"),
    ("hsdp", "zero2"), ("zero1", "zero1"),
]  # fmt: skip


@pytest.mark.parametrize(("writer", "reader"), PATHS, ids=[f"{w} to {r}" for w, r in PATHS])
def test_any_engine_resumes_from_any(writer: str, reader: str, tmp_path: Path) -> None:
    processes, engine = ENGINES.get(writer, PLAIN)
    run(write, processes, engine, str(tmp_path), alone=writer == "plain")
    processes, engine = ENGINES.get(reader, PLAIN)
    expected = reference()["losses"][HALF:STEPS]
    for losses, _ in run(resume, processes, engine, str(tmp_path), alone=reader == "plain"):
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-5


def halves(value: float, rank: int) -> list[Piece]:
    return [Piece(name="a", tensor=torch.full((3,), value), start=3 * rank, shape=(2, 3))]


def write_three(world: World, folder: str) -> None:
    for step in (1, 2, 3):
        store.save(Path(folder), step, halves(float(step), world.rank), world=world, extra={}, keep=9)


def take_newest(world: World, folder: str, blind: str) -> tuple[str, int | None]:
    """Returns what is said and the step. `blind` is a file that process 1 sees otherwise than process 0."""
    if world.rank == 1 and blind:
        from ijepa_scale.checkpoint import manifest

        seen = manifest.digest_of_files
        manifest.digest_of_files = lambda paths: "other" if paths[0].name == blind else seen(paths)  # type: ignore
    try:
        found = store.newest_whole(Path(folder), world)
    except (CheckpointError, ConfigError) as error:
        return f"{type(error).__name__}: {error}", None
    assert found is not None
    filled = halves(0.0, world.rank)
    found.load(filled)
    assert filled[0].tensor.eq(found.step).all()
    return "", found.step


def test_processes_take_the_same_checkpoint(tmp_path: Path) -> None:
    run(write_three, 2, str(tmp_path))
    for step, rank in ((3, 1), (2, 0)):
        file = tmp_path / f"step-0000000{step}" / f"process-0000{rank}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert run(take_newest, 2, str(tmp_path), "") == [("", 1), ("", 1)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000002", "damaged-step-00000003",
                                                          "step-00000001"]  # fmt: skip


def test_a_process_that_reads_other_bytes_sets_nothing_aside(tmp_path: Path) -> None:
    run(write_three, 2, str(tmp_path))
    first, second = run(take_newest, 2, str(tmp_path), "process-00001.safetensors")
    assert first == second
    assert (
        first[0].startswith("ConfigError: process 1 can't read") and "file system that all processes share" in first[0]
    )
    assert len(list(tmp_path.glob("step-*"))) == 3


def pieces(value: float) -> list[Piece]:
    return [Piece(name="a", tensor=torch.full((6,), value), start=0, shape=(2, 3))]


def test_save_keeps_the_newest_and_cleans_up(tmp_path: Path) -> None:
    (tmp_path / ".unfinished-step-00000009").mkdir()
    for step in (1, 2, 3):
        store.save(tmp_path, step, pieces(float(step)), world=ALONE, extra={}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    assert store.newest(tmp_path) == tmp_path / "step-00000003"


def test_a_folder_without_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    store.save(tmp_path, 1, pieces(1.0), world=ALONE, extra={}, keep=2)
    (tmp_path / "step-00000002").mkdir()
    assert store.newest(tmp_path) == tmp_path / "step-00000001"
    with pytest.raises(CheckpointError, match="has no manifest.json; give a folder like"):
        store.Checkpoint(tmp_path / "step-00000002")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = store.save(tmp_path, 1, pieces(1.0), world=ALONE, extra={}, keep=2)
    file = path / "process-00000.safetensors"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="process-00000.safetensors is damaged: .* remove .*step-00000001"):
        store.Checkpoint(path).load(pieces(0))
    file.write_bytes(intact[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        store.Checkpoint(path).load(pieces(0))
    file.unlink()
    with pytest.raises(CheckpointError, match="is damaged: missing, expected"):
        store.Checkpoint(path).load(pieces(0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "manifest.json is damaged; remove"),
        ('{"sha256": "0", "body": {"format": 1}}', "manifest.json is damaged; remove"),
        ("[1]", "manifest.json is damaged; remove"),
        ("{}", "isn't a checkpoint: its manifest.json is of something else"),
    ],
)
def test_a_damaged_manifest_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = store.save(tmp_path, 1, pieces(1.0), world=ALONE, extra={}, keep=2)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        store.Checkpoint(path)


def reseal(path: Path, **changes: object) -> None:
    """Changes the manifest's body and its hash, as another or a later program would."""
    import hashlib

    body = {**json.loads((path / "manifest.json").read_text())["body"], **changes}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))


def test_other_formats_and_outside_files_are_refused(tmp_path: Path) -> None:
    path = store.save(tmp_path, 1, pieces(1.0), world=ALONE, extra={}, keep=2)
    reseal(path, files=[{"name": "../process-00000.safetensors", "bytes": 1, "sha256": ""}])
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        store.Checkpoint(path)
    reseal(path, format=99)
    with pytest.raises(CheckpointError, match="has format 99, but this version reads 1"):
        store.Checkpoint(path)


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    path = store.save(tmp_path, 1, pieces(1.0), world=ALONE, extra={}, keep=2)
    with pytest.raises(CheckpointError, match=r"a has shape \(2, 3\), the model \(3, 3\)"):
        store.Checkpoint(path).load([Piece(name="a", tensor=torch.zeros(9), start=0, shape=(3, 3))])
    with pytest.raises(CheckpointError, match="b is missing"):
        store.Checkpoint(path).load([Piece(name="b", tensor=torch.zeros(6), start=0, shape=(2, 3))])


def test_a_gap_is_refused(tmp_path: Path) -> None:
    half = [Piece(name="a", tensor=torch.ones(3), start=0, shape=(2, 3))]
    path = store.save(tmp_path, 1, half, world=ALONE, extra={}, keep=2)
    with pytest.raises(CheckpointError, match="a has only 3 of the 6 elements from 0 on"):
        store.Checkpoint(path).load(pieces(0))


def test_an_older_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        path = store.save(tmp_path, 1, pieces(value), world=ALONE, extra={}, keep=2)
    filled = pieces(0)
    store.Checkpoint(path).load(filled)
    assert filled[0].tensor.eq(2).all()
    shutil.rmtree(path)
    assert store.newest(tmp_path) is None


def test_the_trained_encoder_loads_from_a_checkpoint(tmp_path: Path) -> None:
    built, step = make(ALONE, EngineConfig(strategy="plain", precision="fp32"), AdamWConfig(), masks_config())
    step(part(0, ALONE))
    extra = {"config": {"model": MODEL.values()}}
    store.save(tmp_path / "checkpoints", 1, built.pieces(), world=ALONE, extra=extra, keep=1)
    images = images_of(part(1, ALONE))
    target, _ = ijepa_scale.load(tmp_path)
    assert torch.equal(target(images), built.target(images))
    context, _ = ijepa_scale.load(tmp_path / "checkpoints" / "step-00000001", which="context")
    assert not torch.equal(context(images), target(images))
