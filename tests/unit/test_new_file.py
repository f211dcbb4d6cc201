"""Files have the permissions that the user's umask gives to new files, whichever library writes them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ijepa_scale.checkpoint.store import write_safetensors
from ijepa_scale.checkpoint.whole import write_file, write_folder
from ijepa_scale.data.shards.write import Sample, write_shards
from ijepa_scale.data.sources.tar_index import index_path, index_tar
from ijepa_scale.evaluate.feature_files import write_features
from ijepa_scale.metrics.plots import new_figure, save_figure
from ijepa_scale.new_file import new_file

TENSORS = {"a": torch.zeros(2, 3)}


def through_new_file(path: Path) -> None:
    with new_file(path) as temporary:
        save_file(TENSORS, temporary)


def over_another(path: Path) -> None:
    path.touch(mode=0o600)
    (path.parent / f".unfinished-{path.name}").touch(mode=0o600)  # of a run that was killed
    through_new_file(path)


def features(suffix: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        rows = [(np.zeros((2, 3), np.float32), ["x", "y"])]
        write_features(path.with_suffix(suffix), (2, 3), lambda: iter(rows), {"model": "m"})

    return write


def shards(path: Path) -> None:
    write_shards([Sample("a", b"\xff\xd8\xff", 0)], path.parent / "shards")
    (tar,) = (path.parent / "shards").glob("*.tar")
    index_path(tar).unlink(missing_ok=True)
    index_tar(tar)


WRITERS: dict[str, Callable[[Path], object]] = {
    "new_file": through_new_file,
    "over a file of the owner's": over_another,
    "a picture": lambda path: save_figure(new_figure(width=2, height=2), path),
    "export, a file": lambda path: write_file(path, lambda temporary: write_safetensors(TENSORS, temporary)),
    "export, a folder": lambda path: write_folder(path, lambda new: save_file(TENSORS, new / "model.safetensors")),
    "embed .npy": features(".npy"),
    "embed .safetensors": features(".safetensors"),
    "shards": shards,
}


def check_modes(folder: Path, umask: int) -> None:
    """Checks each file. An index isn't written by the group in any case, since what it says is believed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        usual = 0o644 if path.name.endswith(".idx.npz") else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
@pytest.mark.parametrize("writer", WRITERS)
def test_files_have_the_users_umask(tmp_path: Path, writer: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path / "made")
    finally:
        os.umask(before)
    check_modes(tmp_path, umask)
