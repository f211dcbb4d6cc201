"""Every script that writes: where it can't, one line that names the file or folder, code 2, and nothing left behind."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ijepa_scale.checkpoint.whole import write_file
from ijepa_scale.errors import CheckpointError
from ijepa_scale.evaluate.array_file import opened, write_array
from ijepa_scale.new_file import PatientFile, named, new_file
from ijepa_scale.terminal import command, file_problem
from ijepa_scale.train.pretrain import pretrain
from launch import embed, evaluate, export, finetune, report, shards, tune, visualize
from launch import pretrain as pretraining
from tests.distributed.commands import ROOT, write_data, write_photos
from tests.unit.small_disks import fill, small_disk
from tests.unit.train.test_saver import configured
from tests.unit.train.test_start import ALONE

Place = Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, shards and photos."""
    folder = tmp_path_factory.mktemp("made")
    write_data(folder / "data")
    write_photos(folder / "data", folder / "ph")
    pretrain(configured(folder, folder / "data", "run", schedule__stop_after=2, evaluate__every=0), ALONE)
    return folder


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A folder that takes no file."""
    if request.param == "a file":
        (tmp_path / "file").touch()
        yield tmp_path / "file"
    elif request.param == "/proc":
        yield Path("/proc/self/nothing-here")
    else:
        options = "ro" if request.param == "read-only" else "rw"
        with small_disk(tmp_path / "disk", kib=64, options=options) as folder:
            if request.param == "full":
                fill(folder)
            yield folder


def arguments(name: str, made: Path, place: Path) -> list[object]:
    run, photos, data = made / "run", made / "ph" / "photos", made / "data"
    training = ["folder=" + str(place / "run"), "data.workers=0", "engine.device=cpu", "engine.precision=fp32"]
    return {
        "pretrain": ["--config", made / "run.yaml", *training],
        "finetune": [
            "--config", ROOT / "configs" / "finetune" / "base.yaml", f"model.init={run}", "model.num_classes=2",
            f"data.train={data}", f"evaluate.test={data}", "data.batch_size=8", "engine.strategy=plain", *training,
        ],
        "evaluate": [run, "--data", data, data, "--protocol", "knn", "--to", place / "ev", "--workers", 0],
        "export safetensors": [run, "--to", place / "a.safetensors"],
        "export reference": [run, "--to", place / "a.pth.tar", "--steps-per-epoch", 2],
        "export torch": [run, "--to", place / "a.pt2"],
        "export onnx": [run, "--to", place / "a.onnx"],
        "export timm": [run, "--as", "timm", "--to", place / "timm"],
        "embed npy": [photos, "--model", run, "--to", place / "a.npy", "--workers", 0],
        "embed parquet": [photos, "--model", run, "--to", place / "a.parquet", "--workers", 0],
        "visualize": ["curves", run, "--to", place / "a.png"],
        "report": [run, "--no-pictures", "--to", place / "a.html"],
        "shards": ["make", "--root", photos, "--to", place / "shards", "--workers", 0],
        "tune": ["--config", made / "run.yaml", "--logs", place / "logs", "engine.strategy=plain"],
    }[name]  # fmt: skip


SCRIPTS: dict[str, Callable[..., int]] = {
    "evaluate": evaluate.main, "export": export.main, "embed": embed.main, "visualize": visualize.main,
    "report": report.main, "shards": shards.main, "tune": tune.main,
}  # fmt: skip
PLACES = ["a file", "read-only", "full", "/proc"]
NAMES = [
    "pretrain", "finetune", "evaluate", "export safetensors", "export reference", "export torch", "export onnx",
    "export timm", "embed npy", "embed parquet", "visualize", "report", "shards", "tune",
]  # fmt: skip


# a full disk takes the logs of `tune`, which are empty at first, and so isn't among its cases
CASES = [(name, place) for name in NAMES for place in PLACES if (name, place) != ("tune", "full")]


@pytest.mark.parametrize(("name", "place"), CASES, indirect=["place"])
def test_a_place_that_takes_nothing_is_one_line(
    name: str, place: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(place)) if place.is_dir() else None
    given = [str(each) for each in arguments(name, made, place)]
    script = name.partition(" ")[0]
    code: object
    try:
        if script in SCRIPTS:
            code = SCRIPTS[script](given)
        else:
            from ijepa_scale.train.command import launch

            monkeypatch.setattr(sys, "argv", [script, *given])
            launch("", pretraining.PretrainTask if script == "pretrain" else finetune.FinetuneTask)
            code = 0
    except SystemExit as ended:
        code = ended.code
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert code == 2 and len(errors) == 1 and str(place) in errors[0], said
    assert "Traceback" not in said
    if before is not None and script not in ("pretrain", "finetune", "evaluate", "embed", "shards"):
        assert sorted(os.listdir(place)) == before, "nothing is left"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EISDIR, errno.EIO])
def test_errors_of_files_are_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(_: object) -> int:
        raise OSError(number, os.strerror(number), "some/file\n")

    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: some/file\\n can't be ") and os.strerror(number) in said and said.count("\n") == 1


def test_other_errors_of_the_system_keep_their_traceback() -> None:
    assert file_problem(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert file_problem(FileNotFoundError(errno.ENOENT, "No such file")) is None  # a fault of the program


def test_a_new_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    with new_file(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_errors_of_a_disk_name_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(OSError, match="No space left on device: 'x'"), named("x"):
        np.arange(10_000).tofile("/dev/full")
    with small_disk(tmp_path / "disk", kib=16) as folder:  # not /dev/full: safetensors renames, as root a device too
        with pytest.raises(OSError, match="No space left on device: 'x'"), named("x"):
            save_file({"a": torch.zeros(10_000)}, folder / "a.safetensors")
    with pytest.raises(OSError) as other, named("x"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert other.value.filename is None


@pytest.mark.parametrize("save", [torch.save, lambda content, file: torch.export.save(_program(), file)])
def test_torch_saves_to_a_full_disk_with_an_error_only(save: Callable[..., None], tmp_path: Path) -> None:
    """torch ends the process, or hides the reason, where a write of its own fails."""
    with pytest.raises(OSError, match="No space left"), PatientFile(Path("/dev/full")) as file:
        save({"a": torch.zeros(100)}, file)
    with PatientFile(tmp_path / "a.pt2") as file:
        save({"a": torch.zeros(100)}, file)
    assert (tmp_path / "a.pt2").stat().st_size > 400


def _program() -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.Linear(100, 3), (torch.zeros(2, 100),))


def test_an_array_larger_than_the_disk_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as folder:
        with pytest.raises(OSError, match="No space left on device"):
            write_array(folder / "a.npy", (64, 1024), (np.ones((1, 1024), np.float32) for _ in range(64)))
        assert os.listdir(folder) == []
        write_array(folder / "a.npy", (4, 1024), (np.ones((1, 1024), np.float32) for _ in range(4)))
        assert opened(folder / "a.npy", 4).sum() == 4096  # type: ignore[union-attr]


def test_only_files_are_replaced_and_links_are_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name in ("pipe", "to-pipe"):
        with pytest.raises(OSError, match="a device or a pipe, which no file may replace"):
            with new_file(tmp_path / name) as temporary:
                temporary.write_text("x")
        with pytest.raises(CheckpointError, match=f"{name} can't be written .*a device or a pipe, which no file may"):
            write_file(tmp_path / name, lambda path: path.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for text in ("first", "second"):
        with new_file(tmp_path / "link") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "there", "to-pipe"]
