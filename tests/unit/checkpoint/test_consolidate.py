"""A checkpoint that is converted holds the same bits in other files, whole or not at all, and a run goes on from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_scale.checkpoint.consolidate import consolidate
from ijepa_scale.checkpoint.digests import digest_of_files
from ijepa_scale.checkpoint.inspect import differences, listed
from ijepa_scale.checkpoint.manifest import write_manifest
from ijepa_scale.checkpoint.store import Checkpoint, write_safetensors
from ijepa_scale.errors import CheckpointError, ConfigError
from ijepa_scale.train.pretrain import pretrain
from tests.unit.checkpoint.test_inspect import call
from tests.unit.checkpoint.test_whole import ALONE, DAMAGE
from tests.unit.small_disks import small_disk
from tests.unit.train.test_saver import configured, rows, state
from tests.unit.train.test_start import data

__all__ = ["data"]
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def scattered(folder: Path, sizes: list[int], cuts: list[list[int]], files: int) -> dict[str, torch.Tensor]:
    """Writes a checkpoint whose tensors are cut into pieces, dealt out to files; returns the tensors."""
    folder.mkdir(parents=True)
    tensors = {f"model.{number}": torch.randn(size) for number, size in enumerate(sizes)}
    held: list[dict[str, tuple[int, torch.Tensor]]] = [{} for _ in range(files)]
    for number, (name, tensor) in enumerate(tensors.items()):
        ends = sorted({0, len(tensor), *(cut % len(tensor) for cut in cuts[number % len(cuts)])})[: files + 1]
        ends[-1] = len(tensor)
        for place, (low, high) in enumerate(zip(ends, ends[1:], strict=False)):
            held[(number + place) % files][name] = (low, tensor[low:high])
    entries = []
    for number, inside in enumerate(held):
        if inside:
            path = folder / f"process-{number:05d}.safetensors"
            write_safetensors({name: piece.contiguous() for name, (_, piece) in inside.items()}, path)
            digest = digest_of_files([path])
            entries.append({
                "name": path.name, "bytes": path.stat().st_size, "sha256": digest,
                "pieces": [[n, low, len(piece), [len(tensors[n])]] for n, (low, piece) in inside.items()],
            })  # fmt: skip
    write_manifest(folder, 7, entries, {"identity": {"x": 1}})
    return tensors


@given(
    SIZES,
    st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 5),
)
@settings(max_examples=20, deadline=None)
def test_any_pieces_become_any_number_of_files_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cuts: list[list[int]], before: int, after: int
) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    tensors = scattered(folder / "old", sizes, cuts, before)
    found = Checkpoint(consolidate(folder / "old", folder / "a" / "new", files=after))
    assert len(found.files) == min(after, sum(sizes))
    assert (found.step, found.extra) == (7, {"identity": {"x": 1}})
    full = found.full("model.")
    assert full.keys() == {name.removeprefix("model.") for name in tensors}
    assert all(torch.equal(full[name.removeprefix("model.")], tensor) for name, tensor in tensors.items())
    largest = max(stored.bytes for stored in found.files)
    assert largest <= 4 * (sum(sizes) // after + 1) + 4096, "the files are of like sizes"
    assert all(": 0 of " in line for line in differences(folder / "old", folder / "a" / "new"))
    assert os.listdir(folder / "a") == ["new"]


def test_a_run_goes_on_from_it(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(configured(tmp_path, data, "whole"), ALONE)
    pretrain(configured(tmp_path, data, "first", schedule__stop_after=4), ALONE)
    kept = tmp_path / "kept"
    code, said = call(capsys, "convert", tmp_path / "first", "--to", kept, "--files", 3)
    assert code == 0 and f"{kept}: complete; resume from it with resume={kept}" in said
    assert len(list(kept.glob("*.safetensors"))) == 3
    assert [line.problem for line in listed([kept], hashed=True)] == [None]
    pretrain(configured(tmp_path, data, "second", resume=str(kept)), ALONE)
    assert state(tmp_path / "second")["files"] == state(tmp_path / "whole")["files"]
    assert rows(tmp_path / "second") == [row for row in rows(tmp_path / "whole") if row["step"] > 4]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    scattered(tmp_path / "old", [30, 20], [[7]], 2)
    file = next((tmp_path / "old").glob("*.safetensors"))
    os.replace(file, tmp_path / "old" / "process-00000.safetensors")
    DAMAGE[kind](tmp_path / "old")
    with pytest.raises((CheckpointError, ConfigError)):
        consolidate(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


def test_what_it_refuses(tmp_path: Path) -> None:
    scattered(tmp_path / "old", [30], [[7]], 2)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"there exists; name a new folder with --to"):
        consolidate(tmp_path / "old", tmp_path / "there")
    with pytest.raises(ConfigError, match=r"there isn't a checkpoint and has none; give a run, or RUN/checkpoints"):
        consolidate(tmp_path / "there", tmp_path / "new")
    with small_disk(tmp_path / "disk", kib=16) as disk:
        scattered(tmp_path / "large", [10_000], [[7]], 2)
        with pytest.raises(CheckpointError, match=r"new can't be written \(it needs 40000 bytes, and \d+ are free\)"):
            consolidate(tmp_path / "large", disk / "new")
        assert os.listdir(disk) == []


def test_a_source_that_goes_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scattered(tmp_path / "old", [30], [[7]], 2)
    trusted = Checkpoint.trusted

    def gone(checkpoint: Checkpoint) -> Checkpoint:
        next((tmp_path / "old").glob("*.safetensors")).unlink()
        return trusted(checkpoint)

    monkeypatch.setattr(Checkpoint, "trusted", gone)
    with pytest.raises(CheckpointError, match=r"old/process-\d+.safetensors can't be read"):
        consolidate(tmp_path / "old", tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


BOUNDED = """
import pathlib, re, sys, threading, time
import torch
from ijepa_scale.checkpoint.consolidate import consolidate
peak, done = 0, False
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
consolidate(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
done = True
thread.join()
print(peak - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    scattered(tmp_path / "old", [40_000_000], [[12_345_678]], 2)
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / "old"), str(tmp_path / "new")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert int(ran.stdout) < 80_000, "KiB, of 160 MB"
